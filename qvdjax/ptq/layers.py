"""One layer (or a stack of them) becomes its quantized form."""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Conv, Execution, InputTransform, LayerScheme, Linear, QuantizedConv, QuantizedLinear
from qvdjax.nn.variables import shape_of
from qvdjax.numerics import encode, sqnr_db


def quantize_layer(
    layer: Linear | Conv, scheme: LayerScheme, *, execution: Execution, fit=None, input_range=None
) -> nnx.Module:
    """The quantized layer that a scheme asks for.

    Args:
        layer: Its arrays may carry one leading axis of layers; these are quantized one after the other, so that the
            temporaries are one layer's.
        scheme: What it becomes.
        execution: How products are computed.
        fit: Fits the scheme's transform (`qvdjax.ptq.transforms`). None leaves it the identity.
        input_range: Smallest and largest input of each channel, [in] each (or [layers, in]). None stands for ranges
            that are to be loaded later.

    Raises:
        UserError: A group size that does not divide the layer's width, a transform or input clip on a convolution, or a
            static input range behind a rotation.
    """
    convolution = isinstance(layer, Conv)
    if convolution and scheme.transforms:
        raise UserError(
            f"a convolution cannot carry {scheme.transforms}", remedy="give its role a rule without transform"
        )
    if convolution and scheme.input_clip is not None:
        raise UserError("a convolution cannot clip its input's range", remedy="give its role a rule without input clip")
    static = scheme.activation is not None and not scheme.activation.dynamic
    if scheme.rotation is not None and static:
        raise UserError(
            "the range of a rotated input does not follow from its channels' ranges",
            remedy="quantize rotated inputs with a dynamic range",
        )
    stacked = len(shape_of(layer.weight)) > (2 + len(layer.kernel) if convolution else 2)
    weight = layer.weight[...]
    if convolution:
        out = 1 + stacked
        weight = weight.reshape(*weight.shape[:out], -1)  # ([layers,] out, in, *kernel) -> ([layers,] out, in * kernel)
    width = shape_of(layer.weight)[1 + stacked]
    group = scheme.weight.group_size if scheme.weight else None
    if group and weight.shape[-1] % group:
        raise UserError(f"group_size {group} does not divide a width of {weight.shape[-1]}", remedy="choose a divisor")
    if input_range is None:
        zeros = jnp.zeros((*weight.shape[:stacked], width), jnp.float32)
        input_range = (zeros, zeros)
    parts = _quantize_stack(weight, *input_range, stacked=stacked, scheme=scheme, fit=fit)
    transform = None
    if scheme.transforms:
        transform = InputTransform(**parts.pop("transform"), rotation=scheme.rotation)
    common = {"role": layer.role, "axes": layer.axes, "scheme": scheme, "execution": execution}
    bias = None if layer.bias is None else layer.bias[...]
    if convolution:
        return QuantizedConv(
            bias=bias, kernel=layer.kernel, stride=layer.stride, padding=layer.padding, **common, **parts
        )
    return QuantizedLinear(bias=bias, transform=transform, **common, **parts)


@functools.partial(jax.jit, static_argnames=("stacked", "scheme", "fit"))
def _quantize_stack(weight, low, high, *, stacked: bool, scheme: LayerScheme, fit) -> dict:
    one = functools.partial(_quantize_arrays, scheme=scheme, fit=fit)
    return jax.lax.map(lambda rows: one(*rows), (weight, low, high)) if stacked else one(weight, low, high)


def _quantize_arrays(weight, low, high, *, scheme: LayerScheme, fit) -> dict:
    """weight [out, in], low and high [channels] -> the arrays of a quantized layer."""
    parts, dtype = {}, jnp.promote_types(weight.dtype, jnp.float32)
    quantized_from = weight.astype(dtype)
    if scheme.transforms:
        if fit is None:
            transform = InputTransform.blank(scheme.transforms, scheme.rotation, weight.shape[-1])
        else:
            transform = fit.fit(quantized_from, low, high)
        quantized_from = transform.on_weight(quantized_from)
        # A channel's range passes through a scale as any input does; static ranges behind rotations are refused.
        low, high = transform(low), transform(high)
        parts["transform"] = transform.arrays()
    if scheme.activation is not None and not scheme.activation.dynamic:
        low, high = (rearrange(edge, "-> 1 1") for edge in (low.min(), high.max()))
        parts["input_scale"], parts["input_zero_point"] = scheme.activation.grid.from_range(low, high)
    if scheme.input_clip is not None:
        parts["input_clip"] = scheme.input_clip.start_table(scheme.activation.symmetric)
    if scheme.weight is None:
        return {**parts, "weight": quantized_from.astype(weight.dtype)}
    quantized = encode(quantized_from, scheme.weight.grid, *scheme.weight.scale_of(quantized_from))
    parts["weight_sqnr_db"] = sqnr_db(quantized_from, quantized.dequantize())
    return {**parts, "weight": quantized}
