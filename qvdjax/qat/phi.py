"""Phi: a low-rank float matrix beside a rounded weight, which takes up the rounding's error while training."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Param
from qvdjax.qat.truncated_svd import Method, truncated_svd

Start = Literal["svd", "zeros", "random"]


class Factor(Param):
    """One of the two factors of Phi, float32. Trained, so a Param; of its own kind, for a learning rate of its own."""


class LowRank(nnx.Module):
    """Phi = L R of rank at most r (QVGen, arXiv 2505.11497, equation 9).

    It meets the same rounded input as the weight does, W_q x_q + Phi x_q, so its `weight` is added to the rounded
    weight and there is one product. Its columns are ordered by strength; a vector `gamma` fades them out (see
    `RankDecay`), and at the end of training nothing is left of it to be stored.

    Attributes:
        left: [..., out, rank], axes those of the weight's rows.
        right: [..., rank, in], axes those of the weight's columns. The rank is split over no devices.
    """

    def __init__(self, left: jax.Array, right: jax.Array, *, axes: tuple):
        """`axes` names the two axes of the weight [out, in]; a leading axis of layers has no name."""
        self.left = Factor(left.astype(jnp.float32), axes=(axes[0], None), keep_float32=True)
        self.right = Factor(right.astype(jnp.float32), axes=(None, axes[1]), keep_float32=True)

    def weight(self, gamma: jax.Array) -> jax.Array:
        """(gamma L) R, float32 [..., out, in], with gamma [rank]."""
        return jnp.matmul(self.left[...] * gamma, self.right[...])


def low_rank(
    residual: jax.Array, rank: int, *, axes: tuple, start: Start = "svd", svd: Method | None = None,
    key: jax.Array | None = None,
) -> LowRank:  # fmt: skip
    """Phi as it begins.

    Args:
        residual: What rounding the weight leaves, W - Q(W), [out, in] or [layers, out, in]. Layers are done one
            after the other, so that the singular vectors of one are held.
        rank: Columns of L. The singular vectors beyond min(out, in) are zero.
        axes: Logical names of the weight's two axes.
        start: "svd" (the paper's): L = U sqrt(S), R = sqrt(S) V^T of the residual's strongest directions, so that the
            layer begins nearest to its unrounded weight. "zeros": L is zero and R random, so that Phi is zero and
            yet has a gradient. "random": both random. The paper found a start from zeros about as good.
        svd: How the directions are found, see `truncated_svd`.
        key: Of what is random; None is `jax.random.key(0)`.

    Random factors are Gaussian and of equal strength. sigma = |residual|_F / sqrt(min(out, in)) is the root mean
    square of the residual's singular values; entries of L have variance sigma / out and those of R sigma / in, which
    makes each direction of L R about sigma strong.

    Raises:
        UserError: A rank below 1, or a start that is not known.
    """
    if start not in get_args(Start):
        raise UserError(f"no start of Phi is called {start!r}", remedy=f"choose {', '.join(get_args(Start))}")
    if rank < 1:
        raise UserError(f"an auxiliary module of rank {rank}", remedy="give a rank of at least 1, or no module")
    key = jax.random.key(0) if key is None else key

    def one(residual: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        residual = residual.astype(jnp.float32)
        if start == "svd":
            u, values, v = truncated_svd(residual, rank, method=svd, key=key)
            root = jnp.sqrt(values)
            return u * root, root[:, None] * v
        rows, columns = residual.shape
        strength = jnp.linalg.norm(residual) / min(rows, columns) ** 0.5
        left_key, right_key = jax.random.split(key)
        left = jax.random.normal(left_key, (rows, rank)) * jnp.sqrt(strength / rows)
        right = jax.random.normal(right_key, (rank, columns)) * jnp.sqrt(strength / columns)
        return (left if start == "random" else jnp.zeros_like(left)), right

    if residual.ndim == 2:
        return LowRank(*one(residual, key), axes=axes)
    keys = jax.random.split(key, residual.shape[0])
    return LowRank(*jax.lax.map(lambda item: one(*item), (residual, keys)), axes=axes)
