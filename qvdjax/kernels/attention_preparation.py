"""What keys and values become before a quantized attention multiplies them, and what its kernels share."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qvdjax.numerics import Grid, QTensor
from qvdjax.numerics.float8 import FLOAT8
from qvdjax.numerics.quantizer import largest_magnitude

CODEBOOKS = (None, FLOAT8)
LOG2_E = math.log2(math.e)
NO_SCORE = -1e30  # of a key that does not count: a power of two of it is 0, and differences stay finite


def prepared(
    key: jax.Array, value: jax.Array, key_lengths: jax.Array | None, *, smooth_key: bool, axis: int
) -> tuple[jax.Array, jax.Array]:
    """Keys less their mean over tokens, and zeros where keys and values do not count.

    Args:
        key, value: [batch, ...] with tokens on `axis`.
        key_lengths: [batch], so many of them count; None for all.
    """
    if key_lengths is not None:
        lengths = key_lengths.reshape(-1, *(1,) * (key.ndim - 1))  # [batch] -> [batch, 1, 1, 1]
        counts = jax.lax.broadcasted_iota(jnp.int32, key.shape, axis) < lengths
        key, value = (jnp.where(counts, a, 0) for a in (key, value))
    if smooth_key:  # adds one constant to all scores of a query
        number = key.shape[axis] if key_lengths is None else lengths.astype(key.dtype)
        key = key - key.sum(axis=axis, keepdims=True) / number
        if key_lengths is not None:
            key = jnp.where(counts, key, 0)
    return key, value


def check_codebook(codebook: str | None, qk_bits: int | None, pv_bits: int | None) -> None:
    """Raise ValueError for codes that the products of attention do not have."""
    if codebook not in CODEBOOKS:
        raise ValueError(f"products of attention have no codebook {codebook!r}; leave it out or give {FLOAT8}")
    for bits in (qk_bits, pv_bits):
        if bits is not None:
            Grid(bits, codebook=codebook)  # which has a word on its bits


def key_scales(largest: jax.Array, grid: Grid, block: int | None) -> jax.Array:
    """Scales of keys from their largest magnitudes, [batch, heads, keys] both; one for each key or for `block`
    neighbours."""
    if block is None:
        return grid.from_largest(largest)
    keys = largest.shape[-1]
    blocks = rearrange(jnp.pad(largest, ((0, 0), (0, 0), (0, -keys % block))), "b h (n c) -> b h n c", c=block)
    return repeat(grid.from_largest(blocks.max(axis=-1)), "b h n -> b h (n c)", c=block)[..., :keys]


def quantize_keys(key: jax.Array, grid: Grid, block: int | None) -> QTensor:
    """Codes of keys [batch, heads, keys, head_dim]; see `key_scales`."""
    scale = key_scales(largest_magnitude(key, axis=-1), grid, block)[..., None]
    return QTensor(grid.encode(key, scale, None).astype(jnp.int8), scale, None, grid.bits, grid.codebook)
