"""The convolution of a quantized input with a quantized weight: of integers, or of the same integers as floats."""

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qvdjax.kernels import tuning
from qvdjax.kernels.convolve import Padding, convolve, mixes_first_axis_alone
from qvdjax.kernels.dispatch import Choice, Implementation, Option, choose, target
from qvdjax.numerics import QTensor


def quantized_convolution(
    x: QTensor, weight: QTensor, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: Padding,
    dtype: DTypeLike, implementation: Implementation | None = None,
) -> jax.Array:  # fmt: skip
    """x [batch, *space, in] with weight [out, (in *kernel)] -> float [batch, *space', out], over one to three axes.

    Args:
        x: Codes; scale and zero point are broadcastable to [batch, *space, in] and the same at all places and channels
            of a sample.
        weight: Codes; a range a row or one in all.
        kernel, stride, padding: One entry an axis. What is padded is zero: the code of it, where zero has a code.
        dtype: Of the layer's input before it was rounded.
        implementation: None for what `quantized_convolution_choice` says, or by name:
            "xla": multiplies int8 codes into int32 and takes zero points off exactly.
            "bfloat16": the codes less their zero points as bfloat16, which holds them exactly. Sums are float32; on
                GPU they are written as bfloat16, as those of a layer in full precision are.
            "simulate": multiplies dequantized floats. The reference.

    Raises:
        UserError: An implementation that is not there or cannot take the arrays.
    """
    choice = quantized_convolution_choice(
        x, weight, kernel=kernel, stride=stride, padding=padding, dtype=dtype, asked=implementation
    )
    unflatten = lambda rows: rows.reshape(rows.shape[0], -1, *kernel)  # noqa: E731  out (in *kernel) -> out in *kernel
    if choice.implementation == "simulate":
        highest = jax.lax.Precision.HIGHEST
        return convolve(x.dequantize(), unflatten(weight.dequantize()), stride, padding, precision=highest)
    if choice.implementation == "bfloat16":
        left, right = (_from_zero(a) for a in (x, weight))
        into = None if target().platform == "gpu" else jnp.float32  # cuDNN's sums have the type of what is multiplied
        total = convolve(left, unflatten(right), stride, padding, into=into)
    else:
        total = _of_integers(x, weight, unflatten, stride, padding)
    return total.astype(x.scale.dtype) * x.scale * weight.scale[..., 0]


def quantized_convolution_choice(
    x: QTensor, weight: QTensor, *, kernel: tuple[int, ...], stride: tuple[int, ...], padding: Padding,
    dtype: DTypeLike, asked: Implementation | None = None,
) -> Choice:  # fmt: skip
    """What computes `quantized_convolution` of such arrays on the device that the program is for, and why.

    Raises `UserError` as `choose` does. No values are looked at.
    """
    device = target()
    products = tuning.settings("quantized_matmul", device) or {}
    row = tuning.settings("quantized_convolution", device) or {}
    no_codes = "codes of float8 have no convolution" if x.grid.floating or weight.grid.floating else None
    no_int8 = None
    if device.platform == "gpu":
        no_int8 = "convolutions of int8 are unreliable on GPU"
    elif len(kernel) > 2 and not mixes_first_axis_alone(kernel, stride, padding):
        no_int8 = "convolutions of int8 over three axes are slow or fail"
    floats = row.get("reason") or products.get("reason")
    integers = None if floats else f"{device.kind} multiplies int8 codes into int32"
    # On GPU what a layer in full precision is: that of a float32 model would be rounded to bfloat16.
    fast = device.platform == "tpu" or (device.platform == "gpu" and jnp.dtype(dtype) == jnp.bfloat16)
    emulated = floats or "the codes are multiplied as bfloat16, which holds them exactly (emulated)"
    return choose("quantized convolution", [
        Option("xla", no_codes or no_int8, integers),
        Option("bfloat16", no_codes, emulated if fast else None),
        Option("simulate", None, floats or "the same integers are multiplied as floats (emulated)"),
        Option("pallas_tpu", "no such kernel was written for convolutions"),
        Option("mosaic_gpu", "no such kernel was written for convolutions"),
    ], asked)  # fmt: skip


def _from_zero(a: QTensor) -> jax.Array:
    """Codes less their zero point, between -255 and 255, as bfloat16."""
    return (a.operands if a.zero_point is None else a.operands - a.zero_point).astype(jnp.bfloat16)


def _of_integers(x: QTensor, weight: QTensor, unflatten, stride, padding) -> jax.Array:
    """int8 codes, padded with the code of zero, into int32 [batch, *space', out]; zero points are taken off exactly."""
    axes = x.codes.ndim
    fill = jnp.zeros((1,) * axes, jnp.int8) if x.zero_point is None else x.zero_point.astype(jnp.int8)
    codes, no_padding = _pad(x.operands, fill, padding), ((0, 0),) * len(padding)
    total = convolve(codes, unflatten(weight.operands), stride, no_padding, into=jnp.int32)
    weight_zero = 0 if weight.zero_point is None else weight.zero_point[..., 0].astype(jnp.int32)  # [out or 1]
    if x.zero_point is not None:
        rows_sum = weight.operands.astype(jnp.int32).sum(axis=-1) - weight.shape[-1] * weight_zero  # [out]
        total = total - x.zero_point.astype(jnp.int32) * rows_sum
    if weight.zero_point is not None:
        ones = unflatten(jnp.ones((1, weight.shape[-1]), jnp.int8))
        total = total - weight_zero * convolve(codes, ones, stride, no_padding, into=jnp.int32)
    return total


def _pad(codes: jax.Array, fill: jax.Array, padding: Padding) -> jax.Array:
    """Pad the spatial axes of codes [batch, *space, in] with `fill` [batch or 1, 1, ...]."""
    for axis, ends in enumerate(padding, start=1):
        shapes = [(*codes.shape[:axis], n, *codes.shape[axis + 1 :]) for n in ends]
        before, after = (jnp.broadcast_to(fill, shape) for shape in shapes)
        codes = jnp.concatenate([before, codes, after], axis=axis)
    return codes
