"""The layout of compressed-tensors (vllm-project/compressed-tensors 0.20, `compressors/`), as that library
reads it.

A linear layer of eight bits is `int-quantized`: `weight` int8. Fewer bits are `pack-quantized`:
`weight_packed` and `weight_shape`, equal to ours, and `weight_zero_point` packed along the output axis.
Scales are [out, 1], [out, groups] or [1]. Its zero points are integers; ours may be fractional and are
rounded.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import numpy as np

from conversion.stored_layers import StoredLayer
from qvdjax.checkpoint import TensorSource
from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme
from qvdjax.numerics import Quantizer
from qvdjax.numerics.float8 import as_float8
from qvdjax.numerics.packing import pack_bits


@dataclasses.dataclass(frozen=True)
class RoundedZeroPoints:
    """What rounding fractional zero points changed.

    Attributes:
        codes: Largest change of a zero point, in steps of the grid.
        weight: Largest change of a weight.
        layer: Where the weight changed most; None when nothing changed.
    """

    codes: float = 0.0
    weight: float = 0.0
    layer: str | None = None


def refuse_transforms(layers: Iterable[StoredLayer]):
    """UserError for layers whose input is transformed or centred, or its range clipped, or that have a branch, an
    estimate, a codebook, a grid of temporal features or ranges of frames or timesteps, which the layout cannot say."""

    def unsaid(scheme: LayerScheme) -> list[str]:
        quantizers = (scheme.weight, scheme.activation)
        books = any(quantizer is not None and quantizer.grid.by_deviation for quantizer in quantizers)
        named = ("input_clip", "low_rank", "feature_grid", "estimator", "centering")
        parts = [part for part in named if getattr(scheme, part) is not None]
        several = scheme.activation is not None and scheme.activation.granularity in ("frame", "step")
        ranges = [f"ranges of each {scheme.activation.granularity}"] if several else []
        return [*scheme.transforms, *parts, *(["codebook"] if books else []), *ranges]

    changes = {layer.name: unsaid(layer.scheme) for layer in layers}
    if names := [f"{name} ({', '.join(what)})" for name, what in changes.items() if what]:
        raise UserError(
            "layers that transform their input, centre it or clip its range, have a branch, an estimate, a codebook or "
            "several static ranges have no form in compressed-tensors",
            remedy="export to diffusers, or quantize with a recipe without transforms",
            items=names,
        )


def layer_tensors(layer: StoredLayer) -> list[TensorSource]:
    """The tensors of a quantized linear layer, without its bias."""
    tensors = _weight(layer) if layer.has_codes else [_copy(layer, "weight")]
    if layer.tensor("input_scale") is not None:
        tensors.append(_ready(layer, "input_scale", layer.tensor("input_scale").reshape(1)))
    zero_point = layer.tensor("input_zero_point")
    if zero_point is not None:
        rounded = _rounded(zero_point, layer.scheme.activation.bits)
        tensors.append(_ready(layer, "input_zero_point", rounded.reshape(1)))
    return tensors


def _weight(layer: StoredLayer) -> list[TensorSource]:
    bits, per_tensor = layer.scheme.weight.bits, layer.scheme.weight.granularity == "tensor"
    scale, zero_point = layer.tensor("weight_scale"), layer.tensor("weight_zero_point")
    if layer.scheme.weight.grid.floating:
        tensors = [_ready(layer, "weight", as_float8(layer.codes()))]
    else:
        tensors = [_copy(layer, part) for part in (("weight",) if bits == 8 else ("weight_packed", "weight_shape"))]
    tensors.append(_ready(layer, "weight_scale", scale.reshape(1) if per_tensor else scale))
    if zero_point is not None:
        zero_point = _rounded(zero_point, bits)  # [out or 1, groups]
        if per_tensor:
            zero_point = zero_point.reshape(1)
        elif bits < 8:
            zero_point = np.ascontiguousarray(pack_bits(zero_point.T, bits).T)  # [words of out, groups]
        tensors.append(_ready(layer, "weight_zero_point", zero_point))
    return tensors


def _rounded(zero_point: np.ndarray, bits: int) -> np.ndarray:
    half = 1 << (bits - 1)
    return np.clip(np.rint(zero_point), -half, half - 1).astype(np.int8)


def rounding(layers: Iterable[StoredLayer]) -> RoundedZeroPoints:
    """What rounding the weights' zero points changes, at worst."""
    worst = RoundedZeroPoints()
    for layer in layers:
        zero_point = layer.tensor("weight_zero_point") if layer.has_codes else None
        if zero_point is None:
            continue
        change = np.abs(zero_point - _rounded(zero_point, layer.scheme.weight.bits))
        weight = float((change * layer.tensor("weight_scale")).max())
        larger = weight > worst.weight
        worst = RoundedZeroPoints(
            max(worst.codes, float(change.max())),
            max(worst.weight, weight),
            layer.name if larger else worst.layer,
        )
    return worst


def _copy(layer: StoredLayer, part: str) -> TensorSource:
    key = f"{layer.name}.{part}"
    info = layer.folder.info(key)
    return TensorSource(key, info.shape, info.dtype, functools.partial(layer.folder.read, key))


def _ready(layer: StoredLayer, part: str, values: np.ndarray) -> TensorSource:
    return TensorSource(f"{layer.name}.{part}", values.shape, values.dtype, lambda: values)


def quantization_config(layers: Iterable[StoredLayer], ignore: Iterable[str]) -> dict[str, Any]:
    """`quantization_config` of config.json.

    Args:
        layers: The quantized layers; equal schemes share a group, which names its layers.
        ignore: The linear layers that stay float.
    """
    groups: dict[tuple, list[str]] = {}
    for layer in layers:
        groups.setdefault((layer.scheme.weight, layer.scheme.activation), []).append(layer.name)
    formats = {_format(weight) for weight, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": targets,
                "weights": _args(weight, "channel"),
                "input_activations": _args(activation, "token"),
                "output_activations": None,
                "format": _format(weight),
            }
            for i, ((weight, activation), targets) in enumerate(groups.items())
        },
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _format(weight: Quantizer | None) -> str:
    if weight is None:
        return "dense"
    if weight.grid.floating:
        return "float-quantized"
    return "int-quantized" if weight.bits == 8 else "pack-quantized"


def _args(quantizer: Quantizer | None, row: str) -> dict[str, Any] | None:
    """QuantizationArgs. One range a row is called `row`: "channel" for weights, "token" for activations."""
    if quantizer is None:
        return None
    return {
        "num_bits": quantizer.bits,
        "type": "float" if quantizer.grid.floating else "int",
        "symmetric": quantizer.symmetric,
        "strategy": row if quantizer.granularity in ("channel", "token") else quantizer.granularity,
        "group_size": quantizer.group_size,
        "dynamic": quantizer.dynamic,
    }
