"""What keys and values become before a quantized attention multiplies them."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qvdjax.numerics import Grid, QTensor, Quantizer, encode, quantize


def prepared(key: jax.Array, value: jax.Array, key_lengths: jax.Array | None, *, smooth_key: bool):
    """Keys less their mean over tokens, and zeros where keys and values do not count; both [..., keys, head_dim] with
    the batch first."""
    if key_lengths is not None:
        lengths = key_lengths.reshape(-1, *(1,) * (key.ndim - 1))  # [batch] -> [batch, 1, 1, 1]
        counts = jax.lax.broadcasted_iota(jnp.int32, key.shape, key.ndim - 2) < lengths
        key, value = (jnp.where(counts, a, 0) for a in (key, value))
    if smooth_key:  # adds one constant to all scores of a query
        number = key.shape[-2] if key_lengths is None else lengths.astype(key.dtype)
        key = key - key.sum(axis=-2, keepdims=True) / number
        if key_lengths is not None:
            key = jnp.where(counts, key, 0)
    return key, value


def quantize_keys(key: jax.Array, bits: int, block: int | None) -> QTensor:
    """Codes of keys [..., keys, head_dim]; one range for `block` neighbouring keys, or one a key."""
    if block is None:
        return quantize(key, Quantizer(bits, granularity="token"), jnp.int8)
    keys = key.shape[-2]
    whole = jnp.pad(key, (*((0, 0),) * (key.ndim - 2), (0, -keys % block), (0, 0)))
    blocks = rearrange(whole, "... (n c) d -> ... n c d", c=block)
    scale, _ = Quantizer(bits, granularity="tensor").scale_of(blocks)  # [..., n, 1, 1]
    scale = repeat(scale, "... n 1 1 -> ... (n c) 1", c=block)[..., :keys, :]
    return encode(key, Grid(bits), scale, None, jnp.int8)
