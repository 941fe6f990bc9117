"""Learned weight quantizers: LSQ (a step size a channel) and LSQ+ (a step size and a fractional zero point).

LSQ: Esser et al., ICLR 2020 (arXiv 1902.08153). LSQ+: Bhalgat et al. 2020 (arXiv 2004.09576), as QVGen's released code
has it for weights (ModelTC/QVGen, `training/quant/quant.py`): the zero point is not rounded.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from qvdjax.numerics import Grid, Quantizer, fake_quantize

Start = Literal["search", "minmax", "mean"]
STARTS = ("search", "minmax", "mean")

SMALLEST_SCALE = 1e-9
_SHRINKS, _SHRINK_STEP, _SEARCH_NORM = 80, 1 / 100, 2.4


def positive(scale: jax.Array) -> jax.Array:
    """The step size in use: no smaller than SMALLEST_SCALE, whatever an optimizer made of it.

    The gradient is that of the identity, so that a step size that went below can come back.
    """
    # Not scale + held(floor - scale), which rounds a floor this small away.
    return jax.lax.stop_gradient(jnp.maximum(scale, SMALLEST_SCALE)) + (scale - jax.lax.stop_gradient(scale))


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """x itself, to the last bit; its gradient is multiplied by `factor`."""
    held = jax.lax.stop_gradient(x)
    return held + factor * (x - held)


def gradient_factor(weights: int, grid: Grid) -> float:
    """1 / sqrt(n P): n weights share the parameter, P is the largest code (symmetric) or the number of steps.

    LSQ section 2.2; QVGen's code takes P = 2**bits - 1 for its asymmetric grid.
    """
    return 1 / math.sqrt(weights * (grid.high if grid.symmetric else grid.high - grid.low))


def fake_quantize_learned(
    weight: jax.Array, grid: Grid, scale: jax.Array, zero_point: jax.Array | None, *, scaled_gradients: bool = True
) -> jax.Array:
    """Quantize and dequantize weight [out, in] with learned parameters [out or 1, groups]; at least float32.

    (clip(round(w / s + z)) - z) s, rounding straight through and the clip with its true derivative. With
    u = w / s + z, q the code and in = whether round(u) lies on the grid, the gradients are (`fake_quantize`)

        of w: in        of s: (q - z) - in w / s        of z: s (in - 1)

    and with `scaled_gradients` those of s and z are multiplied by `gradient_factor`.
    """
    scale = positive(scale)
    if scaled_gradients:
        factor = gradient_factor(weight.size // scale.size, grid)
        scale = scale_gradient(scale, factor)
        zero_point = None if zero_point is None else scale_gradient(zero_point, factor)
    return fake_quantize(weight, grid, scale, zero_point)


def start(weight: jax.Array, quantizer: Quantizer, method: Start = "search") -> tuple[jax.Array, jax.Array | None]:
    """Where the learned parameters begin.

    Args:
        weight: [out, in].
        quantizer: Grid and granularity.
        method: "minmax" covers every weight. "search" shrinks that range to p = 1 - i / 100, i = 0..79, and keeps, for
            each range, the one of least sum |Q(w) - w|**2.4 (EfficientDM's and QVGen's released start). "mean" is LSQ's
            own 2 mean|w| / sqrt(P), symmetric only.

    Returns:
        Scale and zero point (None when symmetric), each [out or 1, groups] float32. The zero point is in our grid's
        shifted codes and not rounded. A range always includes zero, which the release does not ask for: without it a
        channel of one sign would get a zero point far off the codes.

    Raises:
        ValueError: An unknown method, or "mean" for an asymmetric grid.
    """
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    low, high = quantizer.range_of(weight)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    if method == "minmax":
        return _parameters(quantizer.grid, low, high)
    if method == "mean" and quantizer.symmetric:
        size = jnp.abs(quantizer.split_groups(weight)).mean(axis=-1)  # [out, groups]
        if quantizer.granularity == "tensor":
            size = size.mean(axis=-2, keepdims=True)  # [1, groups]
        return jnp.maximum(2 * size / math.sqrt(quantizer.grid.high), SMALLEST_SCALE), None
    if method != "search":
        raise ValueError(f"weights cannot start by {method!r}: use one of {', '.join(STARTS)} ('mean' if symmetric)")
    return _search(weight, quantizer, low, high)


def _parameters(grid: Grid, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Scale and fractional zero point that map [low, high] onto the codes."""
    if grid.symmetric:
        return jnp.maximum(jnp.maximum(-low, high) / grid.high, SMALLEST_SCALE), None
    scale = jnp.maximum((high - low) / (grid.high - grid.low), SMALLEST_SCALE)
    return scale, grid.low - low / scale


def _search(weight, quantizer: Quantizer, low, high):
    grid, groups = quantizer.grid, quantizer.split_groups(weight)  # [out, groups, size]

    def error(shrink):
        scale, zero_point = _parameters(grid, low * shrink, high * shrink)
        scale, zero_point = (None if a is None else a[..., None] for a in (scale, zero_point))  # [out, groups, 1]
        real = grid.decode(grid.encode(groups, scale, zero_point), scale, zero_point)
        total = (jnp.abs(real - groups) ** _SEARCH_NORM).sum(axis=-1)  # [out, groups]
        return total.sum(axis=-2, keepdims=True) if quantizer.granularity == "tensor" else total

    def keep_better(best, shrink):
        best_error, best_shrink = best
        new = error(shrink)
        return (jnp.minimum(new, best_error), jnp.where(new < best_error, shrink, best_shrink)), None

    shrinks = 1 - _SHRINK_STEP * jnp.arange(1, _SHRINKS, dtype=low.dtype)
    first = (error(jnp.ones((), low.dtype)), jnp.ones_like(low))
    (_, shrink), _ = jax.lax.scan(keep_better, first, shrinks)
    return _parameters(grid, low * shrink, high * shrink)
