"""Two factors made orthogonal again: the singular value decomposition of L R without ever forming L R.

With thin L = Q1 R1 and R^T = Q2 R2, the core C = R1 R2^T = U S V^T is r x r, and

    L' = Q1 U sqrt(S),   R' = sqrt(S) V^T Q2^T,   L' R' = L R,   L'^T L' = R' R'^T = S

at a cost of O((out + in) r^2). It is a change of basis, L' = L A and R' = A^-1 R, with

    A = R2^T V / sqrt(S),   A^-1 = U^T R1 / sqrt(S)

(L A = Q1 R1 R2^T V / sqrt(S) = Q1 U S V^T V / sqrt(S) = L'; A^-1 A = U^T C V / S = 1), for which no matrix is inverted.

Why Householder's QR and not the Gram matrices L^T L and R R^T, which would need nothing but products: a Gram matrix
squares the condition, and float32 then knows nothing of a direction of L below sqrt(eps) = 3e-4 of the strongest.
Where R is as weak in that direction, nothing is lost; but nothing in training makes it so. With one direction 1e-5 as
strong in L and 1e5 times stronger in R, Gram matrices lost a quarter of L R. QR keeps L R to rounding, whatever the
factors are.
"""

import dataclasses

import jax
import jax.numpy as jnp

from qvdjax.parallel import constrain

_EXACT = jax.lax.Precision.HIGHEST  # TPU would multiply in bfloat16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BasisChange:
    """L' = L A, R' = A^-1 R, and how everything follows that training keeps beside L and R.

    With W = L R and G the gradient by W, the gradients are G R^T by L and L^T G by R. Those by L' and R' are
    G R'^T = (G R^T) A^-T and L'^T G = A^T (L^T G): gradients, and averages of gradients, follow by the inverse
    transpose where the factors follow by the matrix. In directions that were cut, or are zero but for rounding, both
    matrices are zero, and so is what follows.

    Attributes:
        matrix: A [..., rank, rank], old directions by new.
        inverse: A^-1 [..., rank, rank], new directions by old.
    """

    matrix: jax.Array
    inverse: jax.Array

    def factors(self, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Points (averages of the factors, say): left [..., out, rank] A, A^-1 right [..., rank, in]."""
        return _product(left, self.matrix), _product(self.inverse, right)

    def gradients(self, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Gradients and first moments: left [..., out, rank] A^-T, A^T right [..., rank, in].

        What holds, with AdamW's first moments or SGD's momentum m:

        1. For any A, m' is what the run would have gathered, had it taken place in the new basis; and
           <m', step'> = <m, step> for every step of the factors.
        2. SGD with momentum moves L' R' exactly as it would have moved L R, from there on for ever, if A is orthogonal.
           A A^T is the geometric mean of (L^T L)^-1 and R R^T, so A is orthogonal where L^T L = R R^T; signs and
           the choice of vectors for equal singular values do not enter.
        3. L^T L = R R^T at the start of each phase, and gradient flow conserves L^T L - R R^T among directions of
           equal gate. After k steps of rate h the difference is O(h^2), and the paths of L R with and without the
           change of basis differ by O(h^3) where they have moved by O(h).

        AdamW divides entry by entry, so no change of basis but signs and exchanges leaves its path as it was.
        """
        return _product(left, _transposed(self.inverse)), _product(_transposed(self.matrix), right)

    def squares(self, left: jax.Array, right: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Second moments, averages of squared gradients, by the squared entries of what `gradients` multiplies with.

        Exact where the gradients of different directions are uncorrelated, and never negative. Where A is orthogonal
        each row of L (column of R) keeps its sum.
        """
        return _product(left, _transposed(self.inverse**2)), _product(_transposed(self.matrix**2), right)


def reorthogonalize(
    left: jax.Array, right: jax.Array, active_rank: jax.Array | int | None = None, *, blocks: tuple[int, int] = (1, 1)
) -> tuple[jax.Array, jax.Array, BasisChange]:
    """Cut the directions beyond `active_rank`, then bring L R into the form of its singular value decomposition.

    Static shapes; works inside `jax.jit`, with any leading axes. Nothing is infinite or NaN where factors are zero or
    of lower rank: missing directions become zero (but for rounding) and stay so, since their gradients are zero too.

    Args:
        left: L [..., out, rank].
        right: R [..., rank, in].
        active_rank: Leading directions that are kept, may be traced; None keeps all. Gates have closed the others
            before, so this does not change what the layer computes.
        blocks: Into how many equal parts the rows of L and the columns of R are cut for their QR, see `thin_qr`.

    Returns:
        L' and R' in the types of L and R, strongest direction first, zero beyond `active_rank`; and the change of
        basis in at least float32. Signs are such that A has no negative entry on its diagonal: factors that are in
        this form already do not move.
    """
    if left.ndim > 2:
        # One layer after the other: compiled for TPU, the QR of one stays in fast memory, where that of three layers
        # of 13824 x 32 at once took 436 MiB.
        return jax.lax.map(lambda pair: reorthogonalize(*pair, active_rank, blocks=blocks), (left, right))
    types, rank = (left.dtype, right.dtype), left.shape[-1]
    dtype = jnp.promote_types(jnp.promote_types(*types), jnp.float32)
    left, right = left.astype(dtype), _transposed(right.astype(dtype))  # [..., out, rank], [..., in, rank]
    if active_rank is not None:
        alive = jnp.arange(rank) < active_rank
        left, right = jnp.where(alive, left, 0), jnp.where(alive, right, 0)
    q1, r1 = thin_qr(left, blocks[0])
    q2, r2 = thin_qr(right, blocks[1])
    u, values, v = jnp.linalg.svd(_product(r1, _transposed(r2)), full_matrices=False)
    v = _transposed(v)
    # A layer narrower than the rank has fewer directions; the columns beyond are zero.
    missing = rank - values.shape[-1]
    u, v, values = _widen(u, missing), _widen(v, missing), _widen(values, missing)
    root = jnp.sqrt(values)[..., None, :]  # [..., 1, rank]
    sure = values > rank * jnp.finfo(dtype).eps * values[..., :1]
    inverse_root = jnp.where(sure, 1 / jnp.sqrt(jnp.where(sure, values, 1)), 0)[..., None, :]
    matrix = _product(_transposed(r2), v) * inverse_root  # [..., old, new]
    sign = jnp.where(jnp.diagonal(matrix, axis1=-2, axis2=-1) < 0, -1, 1).astype(dtype)[..., None, :]
    change = BasisChange(matrix * sign, _transposed(_product(_transposed(r1), u) * (inverse_root * sign)))
    left, right = _product(q1, u * (root * sign)), _product(q2, v * (root * sign))
    return left.astype(types[0]), _transposed(right).astype(types[1]), change


def thin_qr(tall: jax.Array, blocks: int = 1) -> tuple[jax.Array, jax.Array]:
    """Q [..., rows, k] with orthonormal columns and R [..., k, columns], k = min(rows, columns).

    With as many blocks as devices hold the rows, no row leaves its device: each block has a QR of its own, and a QR
    of the small R of all blocks, stacked, brings them together (TSQR, Demmel et al. 2012). With one block the compiler
    gathers `tall`, rows x columns numbers.

    Args:
        tall: [..., rows, columns], blocks dividing rows.
        blocks: How many.
    """
    *layers, rows, columns = tall.shape
    if blocks == 1:
        return _whole_qr(tall)
    q, r = jnp.linalg.qr(tall.reshape(*layers, blocks, rows // blocks, columns))  # (b n) c -> b n c
    height = r.shape[-2]
    joint, r = _whole_qr(r.reshape(*layers, blocks * height, columns))  # b h c -> (b h) c
    joint = joint.reshape(*layers, blocks, height, joint.shape[-1])  # (b h) k -> b h k
    q = jnp.einsum("...bnh,...bhk->...bnk", q, joint, precision=_EXACT)
    return q.reshape(*layers, rows, q.shape[-1]), r  # b n k -> (b n) k


def _whole_qr(tall: jax.Array) -> tuple[jax.Array, jax.Array]:
    """QR on every device. TPU's is a loop over columns, which the compiler would spread, and gather in each turn."""
    everywhere = (None,) * tall.ndim
    q, r = jnp.linalg.qr(constrain(tall, *everywhere))
    return constrain(q, *everywhere), constrain(r, *everywhere)


def singular_values(left: jax.Array, right: jax.Array) -> jax.Array:
    """Those of L R, falling, [..., min(rank, out, in)], without forming it."""
    _, r1 = thin_qr(left)
    _, r2 = thin_qr(_transposed(right))
    return jnp.linalg.svd(_product(r1, _transposed(r2)), compute_uv=False)


def small_share(values: jax.Array, threshold: float = 14.0, *, alive: jax.Array | None = None) -> jax.Array:
    """Part of singular values that lie more than `threshold` times below the largest, [...] for values [..., count].

    With `alive` only the first so many count, and 0 where that is none.

    QVGen watches it grow from 73 to 99 % while training, and removes Phi for that reason. The threshold of 14 is
    second hand: the paper's own definition was not to be had. Where all values are zero, all are small.
    """
    largest = jnp.max(values, -1, keepdims=True)
    small = (values * threshold < largest) | (largest == 0)
    if alive is None:
        return jnp.mean(small, -1)
    return jnp.sum(small & (jnp.arange(values.shape[-1]) < alive), -1) / jnp.maximum(alive, 1)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _transposed(a: jax.Array) -> jax.Array:
    return jnp.swapaxes(a, -1, -2)


def _widen(a: jax.Array, columns: int) -> jax.Array:
    """Zero columns behind the last axis."""
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, columns)])
