"""Put quantized layers into a model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import (
    QUANTIZED_LAYERS,
    Attention,
    AttentionScheme,
    Execution,
    LayerScheme,
    TableScheme,
    TimestepTable,
    VideoModel,
    swap_layers,
)  # fmt: skip
from qvdjax.nn.variables import iterate, leading_shape
from qvdjax.ptq.layers import quantize_layer

Ranges = Mapping[str, tuple]  # name in diffusers -> smallest and largest input of each channel
Fitted = Mapping[str, Mapping[str, jax.Array]]  # name in diffusers -> arrays of a layer's transform
Edges = Mapping[str, tuple]  # name in diffusers -> smallest and largest values of its static ranges


def apply_schemes(
    model: VideoModel, schemes: Mapping[str, LayerScheme | AttentionScheme | TableScheme], *, execution: Execution,
    fit=None, ranges: Ranges | None = None, edges: Edges | None = None, rounded: Mapping[str, dict] | None = None,
    fitted: Fitted | None = None,
) -> VideoModel:  # fmt: skip
    """A model whose layers are what `schemes` (by name in diffusers) says; the given model is left as it is.

    Args:
        model: A float model; abstract ones work under `jax.eval_shape`.
        schemes: One scheme a layer and block; layers without one stay as they are. Tables are empty: loading fills
            them (`qvdjax.tabulate` makes full ones).
        execution: How the products of quantized layers are computed.
        fit: Fits the transforms that schemes name.
        ranges: Smallest and largest input of each channel of the layers that need them, by name.
        edges: Of static ranges that were searched for, by name.
        rounded: What linear layers became already (`qvdjax.ptq.rounding`), by name.
        fitted: Transforms that were searched for (`qvdjax.ptq.scale_search`), by name, in the place of `fit`.
    """

    def make(layer, scheme, names):
        if isinstance(scheme, TableScheme):
            return TimestepTable.empty(layer, scheme)
        if isinstance(layer, Attention):
            layer.scheme, layer.execution = scheme, execution
            return layer
        if not scheme.quantizes:
            layer.scheme = scheme
            return layer
        if rounded is not None and names[0] in rounded:
            arrays = stacked_rows(layer, [rounded[name] for name in names])
            return quantize_layer(layer, scheme, execution=execution, arrays=arrays)
        input_range, searched = (
            None if found is None or names[0] not in found else stacked_rows(layer, [found[name] for name in names])
            for found in (ranges, edges)
        )
        transform = None
        if fitted is not None and names[0] in fitted:
            transform = stacked_rows(layer, [fitted[name] for name in names])
        return quantize_layer(
            layer, scheme, execution=execution, fit=fit, input_range=input_range, edges=searched, transform=transform
        )

    return swap_layers(model, schemes, make)


def stacked_rows(layer: nnx.Module, rows: list):
    """Trees of arrays, one a block, in the layout of a layer's arrays: [...] each, or [layers, ...] in a stack."""
    if not leading_shape(layer.weight):
        return jax.tree.map(jnp.asarray, rows[0])
    return jax.tree.map(lambda *a: jnp.stack(a), *rows)


def set_execution(model: VideoModel, execution: Execution) -> VideoModel:
    """Choose how the products of all quantized layers are computed, in place; returns the model."""
    for _, layer in iterate(model, (*QUANTIZED_LAYERS, Attention)):
        layer.execution = execution
    return model
