"""Fake quantization whose gradient passes straight through the rounding."""

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.numerics.grid import Grid
from qvdjax.numerics.quantizer import Quantizer


def round_straight_through(x: jax.Array) -> jax.Array:
    """Round half to even; the gradient is that of the identity."""
    return x + jax.lax.stop_gradient(jnp.round(x) - x)


def clip_inclusive(x: jax.Array, low: float, high: float) -> jax.Array:
    """Clip; the gradient is 1 on [low, high], ends included, and 0 outside.

    `jnp.clip` halves the gradient at the ends, where the largest value of every min-max range lies.
    """
    return jnp.where(x < low, low, jnp.where(x > high, high, x))


def fake_quantize(x: jax.Array, grid: Grid, scale: jax.Array, zero_point: jax.Array | None = None) -> jax.Array:
    """Quantize and dequantize x [..., rows, width]; scale and zero point [..., rows or 1, groups].

    Equal to `encode(...).dequantize()`. Gradients are those of LSQ and LSQ+ (Esser et al. 2020, equation 3; Bhalgat
    et al. 2020): for x, 1 inside the range and 0 outside; for the scale, code - x / scale inside and the clipped
    code outside; for the zero point, 0 inside and -scale outside. Stop the gradient of a scale that was
    computed from x itself to get the plain straight-through estimator.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    grouped = rearrange(x.astype(dtype), "... (groups size) -> ... groups size", groups=scale.shape[-1])
    scale = scale[..., None]
    if grid.codebook is not None:
        # The nearest level straight through. Inside, towards x 1 and towards the scale level - x / scale; beyond the
        # outermost levels, as on even grids, 0 and the level: passed on there, training would drive values further out.
        level = jax.lax.stop_gradient(grid.decode(grid.encode(grouped, scale, None), jnp.ones_like(scale), None))
        ratio = clip_inclusive(grouped / scale, *grid.outermost)
        codes = ratio + jax.lax.stop_gradient(level - ratio)
        return rearrange(codes * scale, "... groups size -> ... (groups size)")
    codes = grouped / scale
    if zero_point is not None:
        codes = codes + zero_point[..., None]
    codes = clip_inclusive(round_straight_through(codes), grid.low, grid.high)
    if zero_point is not None:
        codes = codes - zero_point[..., None]
    return rearrange(codes * scale, "... groups size -> ... (groups size)")


def fake_quantize_dynamic(
    x: jax.Array, quantizer: Quantizer, clip: tuple[jax.Array, jax.Array] | None = None
) -> jax.Array:
    """Fake-quantize x with the range it has now, narrowed by `clip` (see `Quantizer.scale_of`).

    The range itself takes no gradient.
    """
    scale, zero_point = jax.lax.stop_gradient(quantizer.scale_of(x, clip))
    return fake_quantize(x, quantizer.grid, scale, zero_point)
