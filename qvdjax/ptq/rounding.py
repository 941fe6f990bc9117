"""Weights rounded with regard to the inputs of their layers, a few layers at a time."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from qvdjax.calibration.moments import passes, second_moments
from qvdjax.nn import Conv, LayerScheme, Linear, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, own_shape
from qvdjax.ptq.apply import Edges, Fitted, Ranges
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.layers import quantized_arrays
from qvdjax.ptq.rounded_inputs import rounded_inputs


def rounded_layers(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]],
    rounding: ErrorCompensation | None, *, fit=None, ranges: Ranges | None = None, edges: Edges | None = None,
    learned: Mapping[str, Mapping[str, Any]] | None = None, fitted: Fitted | None = None,
) -> dict[str, dict]:  # fmt: skip
    """The arrays of every linear layer whose weight is quantized, and of every convolution that something was learned
    of, by name, for `apply_schemes`.

    Inputs are those that the full-precision model gives its layers. Second moments are collected in several passes over
    the calibration set where those of all layers would take more than `rounding.memory`, and let go of layer by layer.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name in diffusers.
        batches: Keyword arguments of the model's call. Gone over several times; what can be gone over only once is
            held in memory.
        rounding: How weights are rounded; None to the nearest code, for which no inputs are looked at.
        fit, ranges, edges, fitted: As `apply_schemes` takes them.
        learned: What reconstruction found, by name; layers that it did not train have no entry.

    Raises:
        UserError: See `second_moments` and `quantized_arrays`.
    """
    if iter(batches) is batches:
        batches = list(batches)
    weights = quantized_weights(model, schemes)
    kernels = _kernels(model, learned or {})

    def moments():
        if rounding is None:
            yield from ((name, None) for name in weights)
            return
        matrices = 2 if rounding.rounded_inputs else 1  # of each layer
        for names in passes(model, weights, rounding.memory / matrices):
            if rounding.rounded_inputs:
                yield from rounded_inputs(model, batches, names, schemes, lambda name: made(name, weights[name]()))
            else:
                yield from second_moments(model, batches, names)

    def made(name, weight, **how):
        found = (learned or {}).get(name)
        if found is None and fitted is not None and name in fitted:
            found = {"transform": dict(fitted[name])}
        return quantized_arrays(
            weight, schemes[name], name=name, fit=fit, input_range=(ranges or {}).get(name),
            edges=(edges or {}).get(name), learned=found, **how,
        )  # fmt: skip

    arrays = {name: made(name, weights[name](), rounding=rounding, moment=moment) for name, moment in moments()}
    return arrays | {name: made(name, rows(), positions=positions) for name, (rows, positions) in kernels.items()}


def _kernels(model: VideoModel, learned: Mapping[str, Any]) -> dict[str, tuple[Callable[[], jax.Array], int]]:
    """Of every convolution among `learned`, by name: a function that gives its weight [out, (channels positions)], and
    how many positions its kernel has."""

    def getter(layer: Conv, row):
        return lambda: layer.weight[...][row].reshape(own_shape(layer.weight)[0], -1)

    kernels = {}
    for names, _, layer in layers_of(model, (Conv,)):
        stacked = bool(leading_shape(layer.weight))
        for i, name in enumerate(names):
            if name in learned:
                kernels[name] = getter(layer, i if stacked else ...), math.prod(layer.kernel)
    return kernels


def quantized_weights(model: VideoModel, schemes: Mapping[str, Any]) -> dict[str, Callable[[], jax.Array]]:
    """Functions that give the float weight [out, in] of every linear layer that is to be quantized, by name."""

    def getter(layer: Linear, row):
        return lambda: layer.weight[...][row]

    weights = {}
    for names, path, layer in layers_of(model, (Linear,)):
        stacked = path[0] == "stacks" and layer.weight.get_value().ndim > 2
        for i, name in enumerate(names):
            if isinstance(schemes[name], LayerScheme) and schemes[name].weight is not None:
                weights[name] = getter(layer, i if stacked else ...)
    return weights
