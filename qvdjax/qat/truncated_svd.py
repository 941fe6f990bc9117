"""The strongest singular directions of a matrix: exactly, or by random projection where that takes too long."""

from typing import Literal

import jax
import jax.numpy as jnp

Method = Literal["dense", "randomized"]

DENSE_UP_TO = 1024  # of a matrix's smaller side

_EXACT = jax.lax.Precision.HIGHEST  # TPU would multiply in bfloat16


def truncated_svd(
    matrix: jax.Array, rank: int, *, method: Method | None = None, key: jax.Array | None = None,
    power_iterations: int = 4, oversample: int = 16,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """The `rank` largest singular values of one matrix with their vectors.

    "dense" is exact and costs O(n m min(n, m)). "randomized" (Halko, Martinsson and Tropp 2011, algorithm 4.4)
    multiplies the matrix 2 power_iterations + 2 times with rank + oversample columns, orthonormalised in between: a
    hundredth of the work at 5120 x 13824, and only products and thin factors, so a matrix that is spread over
    devices stays where it is. What it finds depends on how fast the singular values fall. An error of rounding is
    close to white noise, the hardest case: with the defaults it finds 95 % of the energy of the dense directions
    for Gaussian weights, 99 % where rows and columns differ in scale as trained weights do. The directions are a
    start which training moves on from, and the paper found other starts as good; so nothing hangs on the rest.

    Args:
        matrix: [out, in]; computed in float32, or float64 if it is that.
        rank: How many; beyond min(out, in) the values are zero.
        method: None takes "dense" where the smaller side is at most `DENSE_UP_TO`, where it takes seconds.
        key: Of the random projection; None is `jax.random.key(0)`.
        power_iterations, oversample: Of the randomized method.

    Returns:
        left [out, rank] with orthonormal columns, values [rank] falling, right [rank, in] with orthonormal rows.
        Directions beyond min(out, in) are zero.
    """
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    smaller = min(matrix.shape)
    if method is None:
        method = "dense" if smaller <= DENSE_UP_TO else "randomized"
    if method == "dense":
        left, values, right = jnp.linalg.svd(matrix, full_matrices=False)
    else:
        key = jax.random.key(0) if key is None else key
        left, values, right = _randomized(matrix, min(rank + oversample, smaller), power_iterations, key)
    left, values, right = left[:, :rank], values[:rank], right[:rank]
    missing = max(rank - smaller, 0)
    return jnp.pad(left, ((0, 0), (0, missing))), jnp.pad(values, (0, missing)), jnp.pad(right, ((0, missing), (0, 0)))


def _randomized(matrix: jax.Array, columns: int, iterations: int, key: jax.Array):
    start = jax.random.normal(key, (matrix.shape[1], columns), matrix.dtype)
    left, _ = jnp.linalg.qr(jnp.matmul(matrix, start, precision=_EXACT))  # [out, columns]
    for _ in range(iterations):
        # Orthonormal after each product: without, the columns would all turn into the first direction.
        right, _ = jnp.linalg.qr(jnp.matmul(matrix.T, left, precision=_EXACT))  # [in, columns]
        left, _ = jnp.linalg.qr(jnp.matmul(matrix, right, precision=_EXACT))
    right, core = jnp.linalg.qr(jnp.matmul(matrix.T, left, precision=_EXACT))  # core [columns, columns]
    # matrix ~ left left^T matrix = left core^T right^T
    u, values, v = jnp.linalg.svd(core.T, full_matrices=False)
    return jnp.matmul(left, u, precision=_EXACT), values, jnp.matmul(v, right.T, precision=_EXACT)
