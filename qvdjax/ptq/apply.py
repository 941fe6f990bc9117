"""Put quantized layers into a model, cutting stacks into segments where neighbouring blocks differ."""

import itertools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import (
    FLOAT_LAYERS, QUANTIZED_LAYERS, Attention, AttentionScheme, Execution, LayerScheme, Stack, VideoModel,
)  # fmt: skip
from qvdjax.nn.variables import dotted, iterate, replace, shape_of
from qvdjax.ptq.layers import quantize_layer

Ranges = Mapping[str, tuple]  # name in diffusers -> smallest and largest input of each channel


def apply_schemes(
    model: VideoModel, schemes: Mapping[str, LayerScheme | AttentionScheme], *, execution: Execution, fit=None,
    ranges: Ranges | None = None,
) -> VideoModel:  # fmt: skip
    """A model whose layers are what `schemes` (by name in diffusers) says; the given model is left as it is.

    Args:
        model: A float model; abstract ones work under `jax.eval_shape`.
        schemes: One scheme a layer and block; layers without one stay as they are.
        execution: How the products of quantized layers are computed.
        fit: Fits the transforms that schemes name.
        ranges: Smallest and largest input of each channel of the layers that need them, by name.
    """
    model = nnx.clone(model)
    for path, layer in iterate(model, FLOAT_LAYERS):
        if path[0] != "stacks":
            _settle(model, path, layer, [dotted(path)], schemes, execution, fit, ranges)
    stacks = []
    for stack in model.stacks:
        stacks += _segments(stack, schemes, execution, fit, ranges)
    model.stacks = nnx.List(stacks)
    return model


def _settle(root, path, layer, names, schemes, execution, fit, ranges) -> None:
    """Give the layer at a path its scheme, which is the same for all its names."""
    scheme = schemes.get(names[0])
    if scheme is None:
        return
    if isinstance(layer, Attention) or not scheme.quantizes:
        layer.scheme = scheme
        if isinstance(layer, Attention):
            layer.execution = execution
        return
    input_range = None
    if ranges is not None and names[0] in ranges:
        pairs = [ranges[name] for name in names]
        input_range = pairs[0] if len(shape_of(layer.weight)) == len(layer.weight.get_metadata("axes")) else _stack_pairs(pairs)
    replace(root, path, quantize_layer(layer, scheme, execution=execution, fit=fit, input_range=input_range))


def _stack_pairs(pairs):
    return tuple(jnp.stack(edges) for edges in zip(*pairs, strict=True))  # [layers, in] each


def _segments(stack: Stack, schemes, execution, fit, ranges) -> list[Stack]:
    """The stack cut where decisions change, each part with its layers in place."""
    layers = list(iterate(stack.block, FLOAT_LAYERS))
    names = {path: stack.names(path) for path, _ in layers}
    count = stack.count or 1
    plans = [tuple(schemes.get(names[path][i]) for path, _ in layers) for i in range(count)]
    parts, start = [], 0
    for _, group in itertools.groupby(range(count), key=lambda i: plans[i]):
        stop = start + len(list(group))
        whole = stop - start == count
        block = stack.block if whole else jax.tree.map(lambda a, s=slice(start, stop): a[s], stack.block)
        for path, layer in list(iterate(block, FLOAT_LAYERS)):
            _settle(block, path, layer, names[path][start:stop], schemes, execution, fit, ranges)
        layers_here = None if stack.count is None else stop - start
        parts.append(Stack(block, prefix=stack.prefix, start=stack.start + start, count=layers_here))
        start = stop
    return parts


def set_execution(model: VideoModel, execution: Execution) -> VideoModel:
    """Choose how the products of all quantized layers are computed, in place; returns the model."""
    for _, layer in iterate(model, (*QUANTIZED_LAYERS, Attention)):
        layer.execution = execution
    return model
