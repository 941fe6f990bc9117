"""The directions of a weight that a low-rank branch takes over."""

import jax
import jax.numpy as jnp

_HIGHEST = jax.lax.Precision.HIGHEST  # the default of accelerators rounds operands to bfloat16 or tf32


def leading_directions(weight: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """down [rank, in] and up [out, rank] whose product up down is the best approximation of a weight [out, in].

    The leading singular vectors of the smaller side are eigenvectors of the weight's product with its transpose, and
    the weight's projection on them gives the other factor: the same as a singular value decomposition cut at `rank`,
    for one symmetric eigenproblem of the smaller side.
    """
    out, width = weight.shape
    if out <= width:
        _, vectors = jnp.linalg.eigh(jnp.matmul(weight, weight.T, precision=_HIGHEST))  # ascending eigenvalues
        up = vectors[:, out - rank :]
        return along(weight, up), up
    _, vectors = jnp.linalg.eigh(jnp.matmul(weight.T, weight, precision=_HIGHEST))
    down = vectors[:, width - rank :].T
    return down, jnp.matmul(weight, down.T, precision=_HIGHEST)


def output_directions(weight: jax.Array, rank: int) -> jax.Array:
    """up [out, rank] with orthonormal columns: of a weight's outputs, those that its best approximation reaches.

    They leave a weight [out, in] in two parts, up (up^T weight) and the rest, and do so alike before and behind any
    transform of its input.
    """
    _, up = leading_directions(weight, rank)
    return jnp.linalg.qr(up)[0]


def along(weight: jax.Array, up: jax.Array) -> jax.Array:
    """down [rank, in] so that up down is what of a weight [out, in] is along orthonormal directions up [out, rank]."""
    return jnp.matmul(up.T, weight, precision=_HIGHEST)


def product(up: jax.Array, down: jax.Array) -> jax.Array:
    """up [out, rank] and down [rank, in] -> what a branch takes of its weight, [out, in]."""
    return jnp.matmul(up, down, precision=_HIGHEST)
