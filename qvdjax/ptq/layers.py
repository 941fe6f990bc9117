"""One layer (or a stack of them) becomes its quantized form."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import (
    Conv,
    EstimatorBranch,
    Execution,
    InputTransform,
    IntervalLinear,
    LayerScheme,
    Linear,
    LowRankBranch,
    QuantizedConv,
    QuantizedLinear,
)  # fmt: skip
from qvdjax.nn.variables import shape_of
from qvdjax.numerics import QTensor, encode, sqnr_db
from qvdjax.ptq.gptq import ErrorCompensation, RoundedInputs
from qvdjax.ptq.low_rank import along, leading_directions, product

ON_CONVOLUTIONS = ("shift", "smooth_scale")
"""Transforms that a convolution's input can take: one number a channel, the same at every position."""
NOT_ON_CONVOLUTIONS = {
    "centering": "centre taken off its input", "low_rank": "low-rank branch", "estimator": "estimate beside it",
    "feature_grid": "grid of temporal features", "timestep_intervals": "intervals of timesteps",
}  # fmt: skip
"""Parts of a scheme that a convolution cannot have, and what they are called."""


def quantize_layer(
    layer: Linear | Conv, scheme: LayerScheme, *, execution: Execution, fit=None, input_range=None, edges=None,
    rounding: ErrorCompensation | None = None, moment: jax.Array | None = None,
    transform: Mapping[str, jax.Array] | None = None, arrays: Mapping[str, Any] | None = None,
) -> nnx.Module:  # fmt: skip
    """The quantized layer that a scheme asks for.

    Args:
        layer: Its arrays may carry one leading axis of layers; these are quantized one after the other, so that the
            temporaries are one layer's.
        scheme: What it becomes.
        execution: How products are computed.
        fit: Fits the scheme's transform (`qvdjax.ptq.transforms`). None leaves it the identity.
        input_range: Smallest and largest input of each channel, [in] each (or [layers, in]). None stands for ranges
            that are to be loaded later. Such a pair for each interval of timesteps where the scheme has some.
        rounding: How the weight of a linear layer is rounded; None to the nearest code.
        moment: Second moments of the input, [in, in] (or [layers, in, in]), which `rounding` needs.
        transform: The arrays of the scheme's transform, with the layer's leading axis if it has one, in the place of
            `fit`.
        arrays: What `quantized_arrays` made of the layer, or a stack of it, instead of the last six.

    Raises:
        UserError: A group size that does not divide the layer's width; a rotation, input clip or branch on a
            convolution; a static input range behind a rotation; second moments that cannot be factored.
    """
    convolution = isinstance(layer, Conv)
    if convolution and (refused := [name for name in scheme.transforms if name not in ON_CONVOLUTIONS]):
        raise UserError(f"a convolution cannot carry {', '.join(refused)}", remedy="give its role a rule without it")
    if convolution and scheme.input_clip is not None:
        raise UserError("a convolution cannot clip its input's range", remedy="give its role a rule without input clip")
    if convolution and any(q is not None and q.codebook is not None for q in (scheme.weight, scheme.activation)):
        raise UserError("a convolution has no codebook", remedy="give its role a rule without one")
    for part, called in NOT_ON_CONVOLUTIONS.items():
        if convolution and getattr(scheme, part) is not None:
            raise UserError(f"a convolution has no {called}", remedy="give its role a rule without one")
    if scheme.timestep_intervals is not None:
        if any(given is not None for given in (edges, rounding, moment, transform, arrays)):
            raise ValueError("layers of intervals are rounded to the nearest code")
        alike = dataclasses.replace(scheme, timestep_intervals=None)
        seen = [None] * len(scheme.timestep_intervals) if input_range is None else input_range
        each = [quantize_layer(layer, alike, execution=execution, fit=fit, input_range=one) for one in seen]
        return IntervalLinear(each, scheme)
    static = scheme.activation is not None and not scheme.activation.dynamic
    if static and (scheme.rotation is not None or scheme.kronecker is not None):
        raise UserError(
            "the range of a rotated input does not follow from its channels' ranges",
            remedy="quantize rotated inputs with a dynamic range",
        )
    stacked = len(shape_of(layer.weight)) > (2 + len(layer.kernel) if convolution else 2)
    weight, positions = layer.weight[...], math.prod(layer.kernel) if convolution else 1
    if convolution:
        out = 1 + stacked
        weight = weight.reshape(*weight.shape[:out], -1)  # ([layers,] out, in, *kernel) -> ([layers,] out, in * kernel)
    if arrays is None:
        learned = None if transform is None else {"transform": dict(transform)}
        arrays = _quantize_stack(
            weight, input_range, moment, learned, edges, stacked=stacked, positions=positions, scheme=scheme, fit=fit,
            rounding=rounding,
        )  # fmt: skip
    parts = _checked(arrays, layer.role)
    transform = None
    if scheme.transforms:
        transform = InputTransform.of(scheme, parts.pop("transform"))
    common = {
        "role": layer.role, "axes": layer.axes, "scheme": scheme, "execution": execution, "transform": transform,
        "frame_axis": layer.frame_axis,
    }  # fmt: skip
    bias = None if layer.bias is None else layer.bias[...]
    if scheme.shift_timesteps is not None:
        if not convolution:
            parts["shifted"] = parts["shifted"][..., 0]  # one position: [[layers,] steps, out, 1] -> without it
    elif "shifted" in parts and not (convolution and any(map(any, layer.padding))):
        # At least float32 whatever the weights are: a far shift makes it large, and its rounding would be an offset.
        shifted = parts.pop("shifted").sum(axis=-1)  # [[layers,] out, positions] -> [[layers,] out]
        bias = shifted if bias is None else shifted + bias.astype(shifted.dtype)
    if convolution:
        return QuantizedConv(
            bias=bias, kernel=layer.kernel, stride=layer.stride, padding=layer.padding, **common, **parts
        )
    low_rank = estimator = None
    if scheme.low_rank is not None:
        low_rank = LowRankBranch(*parts.pop("low_rank"), axes=layer.axes)
    if scheme.estimator is not None:
        estimator = EstimatorBranch(**parts.pop("estimator"), scheme=scheme.estimator, axes=layer.axes)
    return QuantizedLinear(bias=bias, low_rank=low_rank, estimator=estimator, **common, **parts)


def quantized_arrays(
    weight: jax.Array, scheme: LayerScheme, *, name: str, fit=None, input_range=None, edges=None,
    rounding: ErrorCompensation | None = None, moment: jax.Array | None = None,
    learned: Mapping[str, Any] | None = None, positions: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """The arrays of one quantized layer, for `quantize_layer`, which says the other arguments.

    Args:
        weight: [out, in], of a convolution [out, (channels positions)] with `positions` in its kernel.
        name: For messages.
        learned: What reconstruction found for the layer (`qvdjax.ptq.reconstruction`): `transform`, instead of `fit`,
            `input_clip`, `estimator`, the arrays of one, `low_rank_up`, the directions of a low-rank branch, and one of
            `weight_clip`, factors of range ends, `weight_scale`, scale and zero point, and `weight`, the codes
            themselves.

    Raises:
        UserError: A group size that does not divide the width, or second moments that cannot be factored.
    """
    parts = _quantize_stack(
        weight, input_range, moment, learned, edges, stacked=False, positions=positions, scheme=scheme, fit=fit,
        rounding=rounding,
    )  # fmt: skip
    return _checked(parts, name)


def _checked(parts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arrays without the flag that says whether they are right."""
    parts = dict(parts)
    if "factored" in parts and not parts.pop("factored").all():
        raise UserError(
            f"{name}: the second moments of its inputs cannot be factored",
            remedy="raise `damping`, or calibrate with more samples",
        )
    return parts


@functools.partial(jax.jit, static_argnames=("stacked", "positions", "scheme", "fit", "rounding"))
def _quantize_stack(
    weight, input_range, moment, learned, edges, *, stacked: bool, positions: int, scheme: LayerScheme, fit, rounding
) -> dict:
    scheme.check_width(weight.shape[-1])
    one = functools.partial(_quantize_arrays, positions=positions, scheme=scheme, fit=fit, rounding=rounding)
    arguments = (weight, input_range, moment, learned, edges)
    return jax.lax.map(lambda a: one(*a), arguments) if stacked else one(*arguments)


class PreparedWeight(NamedTuple):
    """A layer's weight on the way to its codes.

    Attributes:
        whole: [out, in], what meets the transformed input, at least float32.
        taken: [out, in], what a low-rank branch takes of it; 0 without one.
        moment: [in, in] second moments of the transformed input, or None.
        low, high: Smallest and largest transformed input of each channel [channels], of each timestep that has a shift
            [timesteps, channels].
        arrays: What the layer holds beside codes and scales: the arrays of `transform` and `low_rank`, and of a shift
            `shifted` [[timesteps,] out, positions], what it takes off the product at each position of a kernel.
    """

    whole: jax.Array
    taken: jax.Array | float
    moment: jax.Array | None
    low: jax.Array
    high: jax.Array
    arrays: dict


def prepare_weight(
    weight, input_range, moment, learned, *, scheme: LayerScheme, fit, positions: int = 1
) -> PreparedWeight:
    """weight [out, in], input_range two [[timesteps,] channels] or None, moment [in, in] or None, what was learned or
    None.

    Of a convolution `in` is (channels positions), with that many positions in its kernel.

    Raises:
        UserError: Second moments of an input that is shifted: they are of the input as it comes.
    """
    arrays, dtype = {}, jnp.promote_types(weight.dtype, jnp.float32)
    whole, taken = rows_of_positions(weight.astype(dtype), positions), 0.0
    # Ranges that are to be loaded later are zeros.
    low, high = (jnp.zeros(whole.shape[-1:], jnp.float32),) * 2 if input_range is None else input_range
    if isinstance(moment, jax.Array) and "shift" in scheme.transforms:
        raise UserError(
            "second moments of an input say nothing about it once it is shifted",
            remedy="round to the nearest code, with the same bits for all weights",
        )
    if scheme.transforms:
        if learned is not None:
            transform = InputTransform.of(scheme, learned["transform"])
        elif fit is None:
            transform = InputTransform.blank(scheme, whole.shape[-1])
        else:
            transform = fit.fit(whole, low, high)
        if transform.shift is not None:
            arrays["shifted"] = taken_off(whole, transform.shift[...], positions)
        whole = transform.on_weight(whole)
        # A channel's range passes through a scale as any input does; static ranges behind rotations are refused.
        low, high = transform.of_ranges(low), transform.of_ranges(high)
        if moment is not None and not isinstance(moment, RoundedInputs):  # these are behind the transform already
            moment = transform(transform(moment).T)
        arrays["transform"] = transform.arrays()
    whole = rearrange(whole, "(o p) c -> o (c p)", p=positions)
    if scheme.low_rank is not None:
        if learned is not None and "low_rank_up" in learned:
            up = learned["low_rank_up"]
            factors = along(whole, up), up
        else:
            factors = leading_directions(whole, scheme.low_rank.rank_of(whole.shape))
        # What is rounded is what the branch leaves as it is held, in the type of the weights.
        down, up = arrays["low_rank"] = tuple(factor.astype(weight.dtype) for factor in factors)
        taken = product(up.astype(dtype), down.astype(dtype))
    return PreparedWeight(whole, taken, moment, low, high, arrays)


def rows_of_positions(weight: jax.Array, positions: int) -> jax.Array:
    """[out, (channels positions)] -> [(out positions), channels]: what acts on channels meets one row a position of a
    kernel."""
    return rearrange(weight, "o (c p) -> (o p) c", p=positions)


def taken_off(rows: jax.Array, shift: jax.Array, positions: int) -> jax.Array:
    """What a shift [[timesteps,] channels] takes off the product at each position: rows [(out positions), channels] ->
    [[timesteps,] out, positions]."""
    taken = jnp.matmul(shift, rows.T, precision=jax.lax.Precision.HIGHEST)
    return rearrange(taken, "... (o p) -> ... o p", p=positions)


def transformed_weight(weight: jax.Array, transform: InputTransform | None, positions: int = 1) -> jax.Array:
    """[out, (channels positions)] -> the weight that meets transformed inputs, at least float32."""
    weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
    if transform is None:
        return weight
    return rearrange(transform.on_weight(rows_of_positions(weight, positions)), "(o p) c -> o (c p)", p=positions)


def static_edges(low: jax.Array, high: jax.Array, split: tuple[int, ...] | None) -> tuple[jax.Array, jax.Array]:
    """Ends of a static range that covers the ranges of all channels: two [..., channels] -> two [parts or 1]."""
    return tuple(
        jnp.stack([pick(part) for part in split_channels(ends, split)])
        for pick, ends in ((jnp.min, low), (jnp.max, high))
    )


def static_parameters(scheme: LayerScheme, edges: tuple) -> tuple[jax.Array, jax.Array | None]:
    """Scale and zero point [ranges, 1] of a static input range; `edges` are its ends, [] or [ranges] each."""
    ranges = (len(scheme.split) if scheme.split else scheme.activation.static_ranges, 1)
    low, high = (jnp.broadcast_to(jnp.reshape(edge, (-1, 1)), ranges) for edge in edges)  # -> [ranges, 1]
    return scheme.activation.grid.from_range(low, high)


def _quantize_arrays(
    weight, input_range, moment, learned, edges, *, positions: int, scheme: LayerScheme, fit, rounding
) -> dict:
    """What `prepare_weight` takes, and the edges of a static range or None -> a quantized layer's arrays."""
    prepared = prepare_weight(weight, input_range, moment, learned, scheme=scheme, fit=fit, positions=positions)
    parts = dict(prepared.arrays)
    if scheme.activation is not None and not scheme.activation.dynamic:
        edges = static_edges(prepared.low, prepared.high, scheme.split) if edges is None else edges
        parts["input_scale"], parts["input_zero_point"] = static_parameters(scheme, edges)
    if scheme.feature_grid is not None:
        # Fitted to features of timesteps, which no weight knows (`qvdjax.ptq.feature_grids`): these are only shapes.
        count = scheme.feature_grid.count
        parts |= {"input_levels": jnp.zeros((count,), jnp.float32), "input_edges": jnp.zeros((count - 1,), jnp.float32)}
    if scheme.input_clip is not None:
        start = scheme.input_clip.start_table(scheme.activation.symmetric)
        parts["input_clip"] = start if learned is None else learned["input_clip"]
    if scheme.estimator is not None:
        # A layer that nothing was learned of has an estimate of nothing.
        blank = EstimatorBranch.blank_arrays(scheme.estimator, prepared.whole.shape)
        parts["estimator"] = blank if learned is None else learned["estimator"]
    if scheme.weight is None:
        return {**parts, "weight": prepared.whole.astype(weight.dtype)}
    rest, learned = prepared.whole - prepared.taken, learned or {}
    clip = learned.get("weight_clip")
    if scheme.split is not None:
        quantized = learned["weight"] if "weight" in learned else _encode_parts(rest, scheme, positions)
        real = _real_of_parts(quantized, scheme, positions)
        return {**parts, "weight": quantized, "weight_sqnr_db": sqnr_db(prepared.whole, real)}
    if "weight" in learned:
        quantized = learned["weight"]
    elif "weight_scale" in learned:
        quantized = encode(rest, scheme.weight.grid, *learned["weight_scale"])
    elif rounding is None:
        quantized = encode(rest, scheme.weight.grid, *scheme.weight.scale_of(rest, clip))
    else:
        quantized, parts["factored"] = rounding.round(rest, prepared.moment, scheme.weight, clip)
    parts["weight_sqnr_db"] = sqnr_db(prepared.whole, prepared.taken + quantized.dequantize())
    return {**parts, "weight": quantized}


def split_channels(a: jax.Array, split: tuple[int, ...] | None) -> list[jax.Array]:
    """[..., channels] -> one [..., part] a part; all of it where there are none."""
    return jnp.split(a, np.cumsum(split)[:-1], axis=-1) if split else [a]


def _encode_parts(weight: jax.Array, scheme: LayerScheme, positions: int) -> QTensor:
    """weight [out, (channels positions)] -> codes [out, in] with a scale a part [out, parts].

    The QTensor only carries its arrays: parts may differ in width (`QuantizedConv.qweight`).
    """
    quantizer = scheme.weight
    parts = [
        encode(part, quantizer.grid, *quantizer.scale_of(part))
        for part in split_channels(weight, tuple(positions * channels for channels in scheme.split))
    ]
    joined = [
        None if arrays[0] is None else jnp.concatenate(arrays, axis=-1)
        for arrays in zip(*((part.codes, part.scale, part.zero_point) for part in parts), strict=True)
    ]
    return QTensor(*joined, quantizer.bits)


def _real_of_parts(quantized: QTensor, scheme: LayerScheme, positions: int) -> jax.Array:
    """What the codes of such a QTensor stand for, [out, in]."""
    columns = np.repeat(np.arange(len(scheme.split)), np.array(scheme.split) * positions)
    scale, zero_point = (None if a is None else a[..., columns] for a in (quantized.scale, quantized.zero_point))
    return QTensor(quantized.codes, scale, zero_point, quantized.bits).dequantize()
