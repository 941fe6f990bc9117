"""Scales of input channels by a threshold, searched for with a layer's inputs at hand (Outlier Suppression+)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, Scale, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, replace, shallow_copy
from qvdjax.parallel import to_host
from qvdjax.ptq.apply import stacked_rows
from qvdjax.ptq.layers import quantize_layer
from qvdjax.ptq.transforms import SearchScale


class ScaleSearched(Watcher):
    """A layer that keeps the error that each threshold makes of its last call.

    Attributes:
        errors: [candidates], sums of squares.
        shift, width: [in], middle and half width of each channel's range.
    """

    def __init__(self, layer: Linear | Conv, low: jax.Array, high: jax.Array, scheme: LayerScheme, search: SearchScale):
        super().__init__(layer)
        leading = leading_shape(layer.weight)
        self.shift, self.width = (Scale(a, axes=(None,)) for a in ((low + high) / 2, (high - low) / 2))
        self.errors = Statistic(jnp.zeros((*leading, search.candidates), jnp.float32), axes=(None,))
        self.scheme, self.search = scheme, search

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        exact, shift, width, search = self.layer(x), self.shift[...], self.width[...], self.search

        def error(threshold):
            arrays = {"shift": shift, "smooth_scale": search.scale_of(width, threshold)}
            edges = self._edges(threshold)
            rounded = quantize_layer(self.layer, self.scheme, execution="simulate", transform=arrays, edges=edges)
            return jnp.square((rounded(x) - exact).astype(jnp.float32)).sum()

        self.errors[...] = jax.lax.map(error, search.thresholds(width))

    def _edges(self, threshold: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The range [-T, T]; on an asymmetric grid half a step lower, so that zero is a code (as `RangeSearch` has)."""
        activation = self.scheme.activation
        half = 0 if activation is None or activation.symmetric else threshold / (2**activation.bits - 1)
        return -threshold - half, threshold - half


_observe = jax.jit(observe)


def search_scales(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], search: SearchScale,
    ranges: Mapping[str, tuple],
) -> dict[str, dict[str, np.ndarray]]:  # fmt: skip
    """The shift and the scale of every layer that has both, by name in diffusers.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name. Blocks of one stack have the same.
        batches: Keyword arguments of the model's call.
        search: Which thresholds.
        ranges: Smallest and largest input of each channel, by name.

    Raises:
        UserError: Errors that are not finite; blocks of one stack with different schemes.
    """
    watched, total = shallow_copy(model), None
    for names, path, layer in layers_of(model, (Linear, Conv)):
        kinds = {dataclasses.replace(schemes[name], reason="") for name in names}
        if all("smooth_scale" not in kind.transforms for kind in kinds):
            continue
        if len(kinds) > 1:
            raise UserError(
                "scales are searched for in blocks that are quantized alike", remedy="give them one rule",
                items=names,
            )  # fmt: skip
        scheme = _of_tensor(kinds.pop())
        pair = stacked_rows(layer, [ranges[name] for name in names])
        replace(watched, path, ScaleSearched(layer, *pair, scheme, search))
    for inputs in batches:
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs)))
        total = new if total is None else jax.tree.map(np.add, total, new)
    fitted = {}
    for names, kept in by_layer(watched, total):
        rows = np.reshape(kept["errors"], (len(names), -1))  # [layers,] candidates -> layers candidates
        if not np.isfinite(rows).all():
            raise UserError("calibration met values that are not finite", remedy="check the calibration set")
        for name, errors in zip(names, rows, strict=True):
            low, high = (np.asarray(edge, np.float32) for edge in ranges[name])
            width = jnp.asarray((high - low) / 2)
            best = search.thresholds(width)[int(errors.argmin())]  # the largest of equals
            fitted[name] = {"shift": (low + high) / 2, "smooth_scale": np.asarray(search.scale_of(width, best))}
    return fitted


def _of_tensor(scheme: LayerScheme) -> LayerScheme:
    """The scheme with one range for the whole input, which a threshold is."""
    if scheme.activation is None:
        return scheme
    return dataclasses.replace(scheme, activation=dataclasses.replace(scheme.activation, granularity="tensor"))
