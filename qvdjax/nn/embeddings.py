"""Embeddings that several families share."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import repeat

from qvdjax.kernels import target
from qvdjax.kernels.tiles import in_tiles, out_of_tiles
from qvdjax.parallel.rules import parts


def timestep_sinusoid(timestep: jax.Array, width: int, *, period: float = 10000.0) -> jax.Array:
    """[...] -> [..., width]: cosines, then sines, of timestep * period**(-j / (width / 2)), at least float32.

    As diffusers' get_timestep_embedding with flip_sin_to_cos and no frequency shift (models/embeddings.py).
    """
    dtype = jnp.promote_types(timestep.dtype, jnp.float32)
    half = width // 2
    frequencies = jnp.asarray(period ** -(np.arange(half) / half), dtype)
    angles = timestep[..., None].astype(dtype) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def axial_rope(
    grid: Sequence[int | np.ndarray], widths: tuple[int, ...], *, theta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [tokens, sum(widths) / 2] in float64 for a grid of tokens, last axis fastest.

    Each grid axis owns a block of `widths` features of the head; the blocks lie side by side in grid order. An axis is
    its size, for positions 0, 1, ..., or its positions [size], which may be fractional.
    """
    positions = [np.arange(axis) if np.ndim(axis) == 0 else axis for axis in grid]
    sizes = [len(axis) for axis in positions]
    angles = []
    for axis, (along, width) in enumerate(zip(positions, widths, strict=True)):
        frequencies = theta ** -(np.arange(0, width, 2) / width)
        along = along[:, None] * frequencies  # [size, width / 2]
        shape = [1] * len(sizes) + [width // 2]
        shape[axis] = len(along)
        angles.append(np.broadcast_to(along.reshape(shape), (*sizes, width // 2)))
    angle = np.concatenate(angles, axis=-1).reshape(-1, sum(widths) // 2)  # [tokens, sum(widths) / 2]
    return np.cos(angle), np.sin(angle)


def _neighbours(x: jax.Array, dtype) -> jax.Array:
    """(-x1, x0, -x3, x2, ...) over the last axis, of a wider type."""
    turn = np.zeros((x.shape[-1],) * 2, np.float32)
    even = np.arange(0, x.shape[-1], 2)
    turn[even, even + 1], turn[even + 1, even] = 1, -1
    # One product a sum, so narrow operands lose nothing; wide ones are multiplied as such.
    return jax.lax.dot_general(
        x, jnp.asarray(turn, x.dtype), (((x.ndim - 1,), (0,)), ((), ())), preferred_element_type=dtype,
        precision=jax.lax.Precision.HIGHEST,
    )  # fmt: skip


def rotate_adjacent_pairs(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotate features (0, 1), (2, 3), ... of x [batch, tokens, heads, head_dim] by tables [tokens, head_dim / 2].

    On TPU, neighbours change places by a product with a matrix of ones and zeros, which is exact: every second feature
    of 128 lies across the lanes, and taking them apart and together again copies x a dozen times. Heads come apart in
    tiles there (`qvdjax.kernels.tiles`).
    """
    dtype = jnp.promote_types(x.dtype, cosines.dtype)
    if target().platform == "tpu":
        tiles = in_tiles(x, parts(x.shape[1], "tokens"))
        # [tokens, head_dim / 2] -> [tiles, 1, tokens of one, head_dim]
        cosines, sines = (
            repeat(table, "(n a) d -> n 1 a (d two)", a=tiles.shape[3], two=2) for table in (cosines, sines)
        )
        turned = tiles.astype(dtype) * cosines + _neighbours(tiles, dtype) * sines
        return out_of_tiles(turned.astype(x.dtype))
    wide = x.astype(dtype)
    first, second = wide[..., 0::2], wide[..., 1::2]
    cosines, sines = cosines[:, None, :], sines[:, None, :]  # [tokens, 1, head_dim / 2]
    turned = jnp.stack([first * cosines - second * sines, first * sines + second * cosines], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)  # (head_dim / 2, 2) -> head_dim
