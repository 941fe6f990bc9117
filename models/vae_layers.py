"""Layers that several VAEs share."""

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

from qvdjax.nn import Conv, QuantizedConv, dot_product_attention

ALL = (None, None)  # logical axes: a VAE's weights are small and lie whole on every device
ONE_AROUND = ((1, 1), (1, 1))
AFTER = ((0, 1), (0, 1))  # how VAEs pad before a convolution of stride 2: one row below, one column to the right


def conv(
    features: int, width: int, kernel: tuple[int, ...], *, rngs: nnx.Rngs, dtype, padding=None, stride=None
) -> Conv:  # fmt: skip
    """A convolution from so many features to `width`."""
    return Conv(
        features, width, kernel, role="convolution", axes=ALL, key=rngs.params(), dtype=dtype, padding=padding,
        stride=stride,
    )  # fmt: skip


def doubled(x: jax.Array) -> jax.Array:
    """Every position four times: (..., height, width, channels) -> (..., 2 x height, 2 x width, channels)."""
    return repeat(x, "... h w c -> ... (h two) (w too) c", two=2, too=2)


def attend_within_frames(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Attention of one head among the positions of each frame, all (batch x frames, height, width, channels)."""
    # b h w c -> b (h w) 1 c
    tokens = [a.reshape(a.shape[0], a.shape[1] * a.shape[2], 1, a.shape[3]) for a in (query, key, value)]
    return dot_product_attention(*tokens).reshape(value.shape)  # b (h w) 1 c -> b h w c


def dtype_of(layer: Conv | QuantizedConv) -> jnp.dtype:
    """What a VAE computes in: the type of its weights, or where these are codes that of what is added to them."""
    return layer.bias[...].dtype
