"""The product of two quantized matrices, of integers or of float8, or by simulation in floats."""

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.kernels import tuning
from qvdjax.kernels.dispatch import Choice, Implementation, Option, choose, target
from qvdjax.numerics.qtensor import QTensor

# A product of two 8-bit codes minus their zero points is at most 255 * 255, and int32 must hold the sum.
MAXIMUM_WIDTH = (2**31 - 1) // 255**2


def quantized_matmul(x: QTensor, weight: QTensor, *, implementation: Implementation | None = None) -> jax.Array:
    """x [..., tokens, in] times weight [out, in] over the last axis of both -> float [..., tokens, out].

    Args:
        x: Activation codes; per tensor, token or group.
        weight: Weight codes, two axes; per tensor, output channel or group.
        implementation: None for what `quantized_matmul_choice` says, or by name:
            "xla": multiplies int8 codes into int32 and applies scales and zero points afterwards; exact but for the
                final float32 operations. Of float8, sums in float32; one group.
            "bfloat16": the same codes as bfloat16, which holds them exactly, summed in float32: for devices whose
                products of integers, or of float8, are slow. No zero points, one group.
            "simulate": multiplies dequantized floats. The reference.

    Raises:
        UserError: An implementation that is not there or cannot take the arrays.
        ValueError: A width whose sum int32 cannot hold.
    """
    chosen = quantized_matmul_choice(x, weight, asked=implementation).implementation
    if chosen == "simulate":
        return _contract_float(x.dequantize(), weight.dequantize())
    if chosen == "bfloat16":
        return _contract_as(x, weight, jnp.bfloat16)
    if x.grid.floating:
        return _contract_as(x, weight, jnp.float8_e4m3fn)
    groups = max(x.groups, weight.groups)
    if x.shape[-1] // groups > MAXIMUM_WIDTH:
        raise ValueError(f"a sum over {x.shape[-1]} products does not fit int32; the limit is {MAXIMUM_WIDTH}")
    if groups == 1:
        return _one_group(x.operands, x.scale, x.zero_point, weight.operands, weight.scale, weight.zero_point)
    return _grouped(x, weight, groups)


def quantized_matmul_choice(x: QTensor, weight: QTensor, *, asked: Implementation | None = None) -> Choice:
    """What computes `quantized_matmul` of such arrays on the device that the program is for, and why.

    Raises `UserError` as `choose` does. No values are looked at.
    """
    device = target()
    row = tuning.settings("quantized_matmul", device) or {}
    refusal = None
    if x.zero_point is not None or weight.zero_point is not None:
        refusal = "zero points take large sums off each other, which float32 rounds"
    elif max(x.groups, weight.groups) > 1:
        refusal = "groups have scales of their own"
    floating = (x.grid.floating, weight.grid.floating)
    if all(floating):
        fast = None if refusal is None else f"float8 in {refusal}"
        alone = "neither bfloat16 nor float8 products take the arrays"
        emulated = row.get("float8_reason")
        reason = f"{device.kind} multiplies float8 into float32"
    elif any(floating):
        refusal = fast = alone = "one side is integers, the other float8"
        emulated, reason = None, ""
    else:
        fast, alone, reason = None, None, f"{device.kind} multiplies int8 codes into int32"
        emulated = None if row.get("integer_products", True) else row["reason"]
    return choose("quantized product", [
        Option("bfloat16", refusal, emulated),
        Option("xla", fast, reason),
        Option("simulate", None, alone),
        Option("pallas_tpu", "the kernel begins at floats: see quantized_linear"),
        Option("mosaic_gpu", "no such kernel was written for quantized products"),
    ], asked)  # fmt: skip


def _contract_as(x: QTensor, weight: QTensor, dtype) -> jax.Array:
    """One range a row of either, in a type that holds the codes: float32 sums, of integers exact until they pass
    2^24."""
    left, right = (a.operands.astype(dtype) for a in (x, weight))
    contraction = (((left.ndim - 1,), (1,)), ((), ()))
    total = jax.lax.dot_general(left, right, contraction, preferred_element_type=jnp.float32)
    return total.astype(x.scale.dtype) * x.scale * weight.scale[..., 0]


def _contract_float(x: jax.Array, weight: jax.Array) -> jax.Array:
    # HIGHEST: the default precision of accelerators (bf16 or tf32 passes) would not simulate integers.
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=jax.lax.Precision.HIGHEST)


def contract_integers(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Codes x [..., in] times codes weight [out, in] -> int32 [..., out].

    Sub-byte codes are widened first: operands below a byte do not compile on CPU, and TPU fuses the widening.
    """
    x, weight = x.astype(jnp.int8), weight.astype(jnp.int8)
    contraction = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contraction, preferred_element_type=jnp.int32)


def _one_group(x, x_scale, x_zero, weight, weight_scale, weight_zero):
    """One range along the contraction: scales [..., tokens or 1, 1] and [out or 1, 1]."""
    total = contract_integers(x, weight)  # int32 [..., tokens, out]
    fraction = 0.0
    # sum (x - zx)(w - zw) = sum xw - zx sum w - zw sum x + width zx zw. The integer parts of the zero points are
    # taken off in int32, exactly: in float32 the terms are large and cancel.
    x_whole, x_rest = _whole_and_rest(x_zero)
    weight_whole, weight_rest = _whole_and_rest(None if weight_zero is None else weight_zero[..., 0])
    if x_zero is not None:
        weight_sum = weight.astype(jnp.int32).sum(axis=-1)  # [out]
        if weight_zero is not None:
            weight_sum = weight_sum - weight.shape[-1] * weight_whole
        total = total - x_whole * weight_sum
        fraction = fraction - x_rest * weight_sum
    if weight_zero is not None:
        x_sum = x.astype(jnp.int32).sum(axis=-1, keepdims=True)  # [..., tokens, 1]
        total = total - weight_whole * x_sum
        shifted = x_sum if x_zero is None else x_sum - x.shape[-1] * x_zero
        fraction = fraction - weight_rest * shifted
    real = total.astype(jnp.promote_types(x_scale.dtype, jnp.float32)) + fraction
    return real * x_scale * weight_scale[..., 0]


def _whole_and_rest(zero_point):
    """A zero point as an int32 and the fraction (zero for every calibrated one, not for learned ones) beside it."""
    if zero_point is None:
        return None, None
    # A learned zero point may leave the codes' range; int32 holds the sum only within it, so the rest is a float.
    whole = jnp.clip(jnp.round(zero_point), -128, 127)
    return whole.astype(jnp.int32), zero_point - whole


def _grouped(x: QTensor, weight: QTensor, groups: int) -> jax.Array:
    """Groups along the contraction, one product after the other into a float sum.

    A batched product over groups would hold [tokens, groups, out] at once, and on TPU is 9 to 17 times slower.
    """

    def leading(a, axis_groups):  # the group axis in front, for scan; one shared range is repeated
        if a is None:
            return None
        return jnp.broadcast_to(jnp.moveaxis(a, -1, 0)[..., None], (axis_groups, *a.shape[:-1], 1))

    def codes(a):
        return jnp.moveaxis(rearrange(a, "... (groups size) -> ... groups size", groups=groups), -2, 0)

    def add(total, parts):
        return total + _one_group(*parts), None

    parts = (
        codes(x.operands), leading(x.scale, groups), leading(x.zero_point, groups),
        codes(weight.operands), leading(weight.scale, groups), leading(weight.zero_point, groups),
    )  # fmt: skip
    shape = jax.eval_shape(lambda p: _one_group(*jax.tree.map(lambda a: a[0], p)), parts)
    return jax.lax.scan(add, jnp.zeros(shape.shape, shape.dtype), parts)[0]
