"""`describe`: what every layer of a model became, and why."""

import math
from typing import Any

import jax
import numpy as np
from flax import nnx

from qvdjax.nn import (
    FLOAT_LAYERS,
    QUANTIZED_LAYERS,
    TABLE_LAYERS,
    Attention,
    Codes,
    Conv,
    IntervalLinear,
    Linear,
    QuantizedLinear,
    Statistic,
    TimestepTable,
    VideoModel,
    layers_of,
)  # fmt: skip
from qvdjax.nn.variables import own_shape, shape_of


def describe(model: VideoModel) -> list[dict[str, Any]]:
    """One row a layer and block.

    Returns:
        Rows of `path` (name in diffusers), `role`, `shape` (of the weight, in PyTorch's orientation), `weight_bits`,
        `activation_bits` (16 or 32 and so on for floats), `bytes` (codes at their logical bits, scales, bias),
        `float_bytes` (the same layer in bfloat16), `sqnr_db` (signal-to-quantization-noise ratio of the weight in
        decibels, None for float weights or where the model is abstract), `execution`, `reason` and `online`: what is
        computed beside the product (names of transforms, channels of a rotated block, rank and bytes of a low-rank
        branch, bits of the mean of tokens, and where there is one rank, frames with gains of their own and bytes of an
        estimate, multiply-adds a token and their share of the product's), None for nothing. The products of attention
        have rows only where they are quantized; they hold no bytes. A table over timesteps has `execution` "table",
        `shape` (steps, out), its own type as `weight_bits`, no `activation_bits`, and `replaced_bytes`: those of the
        layer in whose place it stands. Where intervals of timesteps have codes of their own, `bytes` are those of all
        and `sqnr_db` is the lowest.
    """
    rows = []
    for names, _, layer in layers_of(model, (*FLOAT_LAYERS, *QUANTIZED_LAYERS, *TABLE_LAYERS)):
        if isinstance(layer, Attention):
            if layer.scheme.qk_bits or layer.scheme.pv_bits:
                rows += [_attention_row(name, layer) for name in names]
            continue
        row = _table_row(layer) if isinstance(layer, TimestepTable) else _row(layer)
        sqnr = _sqnr(layer, len(names))
        rows += [{"path": name, **row, "sqnr_db": ratio} for name, ratio in zip(names, sqnr, strict=True)]
    return sorted(rows, key=lambda row: _natural(row["path"]))


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorting key that puts block 2 before block 10."""
    return [(len(part), part) if part.isdigit() else (0, part) for part in path.split(".")]


def _row(layer) -> dict[str, Any]:
    if isinstance(layer, IntervalLinear):  # these differ in their numbers alone
        return {**_row(layer.intervals[0]), "reason": layer.scheme.reason, "bytes": layer_bytes(layer)}
    shape, scheme = weight_shape(layer), layer.scheme
    quantized = not isinstance(layer, Linear | Conv)
    bias = 0 if layer.bias is None else shape[0]
    activation = _float_bits(layer)
    if quantized and scheme.activation:
        activation = scheme.activation.bits
    elif quantized and scheme.feature_grid:
        activation = scheme.feature_grid.stored_bits
    return {
        "role": layer.role, "shape": list(shape),
        "weight_bits": scheme.weight.bits if quantized and scheme.weight else _float_bits(layer),
        "activation_bits": activation,
        "bytes": layer_bytes(layer), "float_bytes": 2 * (math.prod(shape) + bias),
        "execution": layer.execution if quantized else "float", "reason": scheme.reason,
        "online": _online(layer, shape),
    }  # fmt: skip


def _online(layer, shape: tuple[int, ...]) -> dict[str, Any] | None:
    """What a layer computes beside its product, None for nothing; multiply-adds are those of one token."""
    transform, branch, estimator = (getattr(layer, name, None) for name in ("transform", "low_rank", "estimator"))
    centering = layer.scheme.centering
    if all(part is None for part in (transform, branch, estimator, centering)):
        return None
    rotation = layer.scheme.rotation
    multiply_adds = 0 if transform is None else transform.multiply_adds(shape[1])
    multiply_adds += 0 if branch is None else branch.rank * sum(shape)
    estimates = {}
    if estimator is not None:
        multiply_adds += estimator.rank * (sum(shape) + (estimator.gain is not None))
        estimates = {
            "estimate_rank": estimator.rank, "estimate_frames": estimator.scheme.frames,
            "estimate_bytes": layer_bytes(estimator),
        }  # fmt: skip
    return {
        "transforms": list(layer.scheme.transforms), **estimates,
        "rotation_block": None if rotation is None else rotation.block_of(shape[1]),
        "center_bits": None if centering is None else centering.bits,
        "rank": None if branch is None else branch.rank,
        "branch_bytes": 0 if branch is None else layer_bytes(branch),
        "multiply_adds": multiply_adds, "share": multiply_adds / math.prod(shape),
    }  # fmt: skip


def _table_row(layer: TimestepTable) -> dict[str, Any]:
    out, width = layer.weight_shape
    value = layer.table.get_value()
    return {
        "role": layer.role, "shape": list(value.shape[-2:]), "weight_bits": 8 * value.dtype.itemsize,
        "activation_bits": None, "bytes": layer_bytes(layer), "float_bytes": 2 * (out * width + out),
        "replaced_bytes": layer.scheme.replaced_bytes, "execution": "table", "reason": layer.scheme.reason,
    }  # fmt: skip


def _attention_row(name: str, layer: Attention) -> dict[str, Any]:
    scheme = layer.scheme
    return {
        "path": name, "role": layer.role, "shape": [], "weight_bits": None, "activation_bits": scheme.qk_bits,
        "probability_bits": scheme.pv_bits, "bytes": 0, "float_bytes": 0, "execution": layer.execution,
        "reason": scheme.reason, "sqnr_db": None,
    }  # fmt: skip


def weight_shape(layer) -> tuple[int, ...]:
    """Shape of one block's weight, [out, in, *kernel]."""
    if isinstance(layer, IntervalLinear):
        return weight_shape(layer.intervals[0])
    if isinstance(layer, Linear | Conv):
        return own_shape(layer.weight)
    shape = shape_of(layer.weight if layer.codes is None else layer.codes)[-2:]
    if isinstance(layer, QuantizedLinear):
        return shape
    return (shape[0], shape[1] // math.prod(layer.kernel), *layer.kernel)


def weight_bytes(model: nnx.Module) -> int:
    """Bytes of all parameters of a model, abstract or not: codes at their logical bits, statistics not counted."""
    variables = jax.tree.leaves(nnx.state(model), is_leaf=lambda node: isinstance(node, nnx.Variable))
    return math.ceil(sum(variable.get_value().size * _element_bits(variable) for variable in variables) / 8)


def layer_bytes(layer: nnx.Module) -> int:
    """Bytes of one block's layer, abstract or not: codes at their logical bits, statistics not counted."""
    variables = jax.tree.leaves(nnx.state(layer), is_leaf=lambda v: isinstance(v, nnx.Variable))
    return math.ceil(sum(_logical_bits(variable) for variable in variables) / 8)


def _logical_bits(variable: nnx.Variable) -> int:
    """Bits of one block's part of a variable."""
    return math.prod(own_shape(variable)) * _element_bits(variable)


def _element_bits(variable: nnx.Variable) -> int:
    """Logical bits of one number; statistics are no part of the layer."""
    if isinstance(variable, Statistic):
        return 0
    return variable.get_metadata("bits") if isinstance(variable, Codes) else 8 * variable.get_value().dtype.itemsize


def _float_bits(layer) -> int:
    variable = layer.weight if getattr(layer, "weight", None) is not None else layer.bias
    return 8 * variable.get_value().dtype.itemsize if variable is not None else 32


def _sqnr(layer, count: int) -> list[float | None]:
    if isinstance(layer, IntervalLinear):
        each = zip(*(_sqnr(one, count) for one in layer.intervals), strict=True)
        return [None if None in ratios else min(ratios) for ratios in each]
    statistic = getattr(layer, "weight_sqnr_db", None)
    if statistic is None or isinstance(statistic.get_value(), jax.ShapeDtypeStruct):
        return [None] * count
    ratios = np.asarray(statistic.get_value(), np.float64).reshape(count)  # [layers] or [] -> layers
    return [round(float(ratio), 2) if np.isfinite(ratio) else None for ratio in ratios]
