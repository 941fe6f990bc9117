"""A linear layer of quantized weight and input, from floats to floats: rounding, product and what follows in one."""

import jax
import jax.numpy as jnp

from qvdjax.kernels import tuning
from qvdjax.kernels.dispatch import Choice, Implementation, Option, choose, target
from qvdjax.kernels.matmul_quantized_tpu import fused_linear, fused_refusal
from qvdjax.kernels.quantized_matmul import quantized_matmul, quantized_matmul_choice
from qvdjax.numerics import QTensor, Quantizer, quantize


def quantized_linear(
    x: jax.Array, weight: QTensor, activation: Quantizer, *, bias: jax.Array | None = None,
    gate: jax.Array | None = None, residual: jax.Array | None = None, dtype=None,
    implementation: Implementation | None = None,
) -> jax.Array:  # fmt: skip
    """residual + gate * (quantized(x) weight^T + bias), whatever of them is there.

    NaN in a row of x makes that row NaN.

    Args:
        x: [..., tokens, in].
        weight: [out, in].
        activation: Of x, dynamic.
        bias: [out].
        gate: Broadcastable to [..., tokens, out].
        residual: [..., tokens, out].
        dtype: Of the result; None for x's.
        implementation: None for what `quantized_linear_choice` says, or by name: "pallas_tpu" is one kernel (see
            `qvdjax.kernels.matmul_quantized_tpu`); any other rounds x in XLA and is an implementation of
            `quantized_matmul`.

    Returns:
        [..., tokens, out]. Everything after the product is at least float32.

    Raises:
        UserError: An implementation that is not there or cannot take the arrays.
        ValueError: A width whose sum int32 cannot hold.
    """
    dtype = x.dtype if dtype is None else dtype
    choice = quantized_linear_choice(x, weight, activation, gate=gate, asked=implementation)
    if choice.implementation == "pallas_tpu":
        return fused_linear(x, weight, activation, bias=bias, gate=gate, residual=residual, dtype=dtype)
    y = quantized_matmul(quantize(x, activation, jnp.int8), weight, implementation=choice.implementation)
    if bias is not None:
        y = y + bias.astype(y.dtype)
    if gate is not None:
        y = y * gate
    return (y if residual is None else y + residual).astype(dtype)


def quantized_linear_choice(
    x: jax.Array, weight: QTensor, activation: Quantizer, *, gate: jax.Array | None = None,
    asked: Implementation | None = None,
) -> Choice:  # fmt: skip
    """What computes `quantized_linear` of such arrays on the device that the program is for, and why.

    Raises `UserError` as `choose` does. No values are looked at.
    """
    device = target()
    refusal = f"the program is for {device.kind}"
    if device.platform == "tpu":
        refusal = fused_refusal(x, weight, activation, gate, device)
    row = tuning.settings("quantized_linear", device, inputs=x.shape[-1], outputs=weight.shape[0]) or {}
    groups = x.shape[-1] // (activation.group_size or x.shape[-1])
    scale = jax.ShapeDtypeStruct((*x.shape[:-1], groups), jnp.float32)
    codes = QTensor(
        jax.ShapeDtypeStruct(x.shape, jnp.int8), scale, None if activation.symmetric else scale, activation.bits,
        activation.codebook,
    )  # fmt: skip
    product = quantized_matmul_choice(codes, weight)
    others = [name for name in ("xla", "bfloat16", "simulate") if name != product.implementation]
    return choose("quantized linear layer", [
        Option("pallas_tpu", refusal, row.get("reason") if row.get("kernel") else None),
        Option(product.implementation, None, product.reason),
        *(Option(name, dict(product.refused).get(name)) for name in others),
        Option("mosaic_gpu", "no such kernel was written for quantized linear layers"),
    ], asked)  # fmt: skip
