"""Static ranges of layers' inputs by search, averaged over the calls of a calibration set (QVD's activation ranges)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, InputTransform, LayerScheme, Linear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, replace, shallow_copy
from qvdjax.numerics import Grid
from qvdjax.parallel import to_host
from qvdjax.ptq.apply import stacked_pairs

Shape = Literal["minmax", "magnitude", "shrink"]


@dataclasses.dataclass(frozen=True)
class RangeSearch:
    """How the static range of an input follows from what calibration sees.

    Each call, a batch of the calibration set, gives a range of its own; the mean of all is the layer's. Read in
    PaddleSlim `example/QVD/QDrop/quant/UniformAffineQuantizer.py`.

    Attributes:
        shape: "minmax": from the smallest to the largest value.
            "magnitude": the [-T, T] of least error, T = max|x| i / `candidates`; one-sided where no value changes sign.
            As released for ranges of a tensor. Zero then lies between two codes; here the whole range is moved by half
            a step, so that it is a code, where the release leaves to rounding errors which of the two it becomes.
            "shrink": the smallest and the largest value times the factor of least error, in steps of 0.01 from 1 to
            0.5. As released for ranges of frames.
        norm: Exponent of the error.
        candidates: Of "magnitude".
    """

    shape: Shape = "magnitude"
    norm: float = 2.4
    candidates: int = 50

    def __post_init__(self):
        if self.shape not in get_args(Shape):
            raise ValueError(f"unknown shape of ranges {self.shape!r}: use one of {', '.join(get_args(Shape))}")
        if self.norm <= 0 or self.candidates < 1:
            raise ValueError(f"a search needs a positive norm and a candidate, not {self.norm} and {self.candidates}")

    def edges(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
        """x [...] -> smallest and largest value of its range, [] each."""
        low, high = x.min(), x.max()
        if self.shape == "minmax":
            return low, high
        if self.shape == "magnitude":
            largest = jnp.maximum(-low, high)
            half_a_step = jnp.where((low < 0) & (high > 0), largest / (2**grid.bits - 1), 0)
            low, high = jnp.where(low < 0, -largest, 0) - half_a_step, jnp.where(high > 0, largest, 0) - half_a_step
            ratios = jnp.arange(self.candidates, 0, -1, dtype=x.dtype) / self.candidates
        else:
            ratios = jnp.arange(100, 49, -1, dtype=x.dtype) / 100

        def error(ratio):
            scale, zero_point = grid.from_range(low * ratio, high * ratio)
            real = grid.decode(grid.encode(x, scale, zero_point), scale, zero_point)
            return (jnp.abs(real - x) ** self.norm).mean()

        best = ratios[jax.lax.map(error, ratios).argmin()]  # the widest of equals
        return low * best, high * best


class Searched(Watcher):
    """A layer that keeps the range that is best for the transformed input of its last call.

    Attributes:
        low, high: [].
        transform: What the input passes through, or None.
    """

    def __init__(
        self, layer: Linear | Conv, leading: tuple[int, ...], transform: InputTransform | None, grid: Grid,
        search: RangeSearch,
    ):  # fmt: skip
        super().__init__(layer)
        self.low, self.high = (Statistic(jnp.zeros(leading, jnp.float32), axes=()) for _ in range(2))
        self.transform, self.grid, self.search = transform, grid, search

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        low, high = self.search.edges(x if self.transform is None else self.transform(x), self.grid)
        self.low[...], self.high[...] = low.astype(jnp.float32), high.astype(jnp.float32)


def search_ranges(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], search: RangeSearch, *,
    fit=None, ranges: Mapping[str, tuple] | None = None,
) -> dict[str, tuple]:  # fmt: skip
    """The edges of every static range, by name in diffusers, for `apply_schemes`.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name. Blocks of one stack may differ in which of them are quantized.
        batches: Keyword arguments of the model's call.
        search: How ranges are found.
        fit, ranges: Of the transforms, as `apply_schemes` takes them.

    Raises:
        UserError: No batch; blocks of one stack with different quantizers of their inputs; values that are not finite.
    """
    watched = _watch(model, schemes, search, fit, ranges)
    total, calls = None, 0
    for inputs in batches:
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs)))
        total = new if total is None else jax.tree.map(np.add, total, new)
        calls += 1
    if total is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    edges = {}
    for names, kept in by_layer(watched, total):
        pairs = (np.reshape(kept[edge] / calls, len(names)).astype(np.float32) for edge in ("low", "high"))
        found = zip(names, zip(*pairs, strict=True), strict=True)
        edges.update((name, pair) for name, pair in found if _static(schemes[name]))
    if broken := [name for name, pair in edges.items() if not np.isfinite(pair).all()]:
        raise UserError("calibration met values that are not finite", remedy="check the calibration set", items=broken)
    return edges


_observe = jax.jit(observe)


def _static(scheme) -> bool:
    return isinstance(scheme, LayerScheme) and scheme.activation is not None and not scheme.activation.dynamic


def _watch(model, schemes, search: RangeSearch, fit, ranges) -> VideoModel:
    watched = shallow_copy(model)
    for names, path, layer in layers_of(model, (Linear, Conv)):
        static = [name for name in names if _static(schemes[name])]
        if not static:
            continue
        # All blocks of a stack are watched at once; what is found about those that stay float is left out.
        scheme = schemes[static[0]]
        if any(
            (schemes[n].activation, schemes[n].transforms) != (scheme.activation, scheme.transforms) for n in static
        ):
            raise UserError(
                "static ranges are searched for in blocks whose inputs are quantized alike",
                remedy="give them one rule, or choose dynamic ranges", items=static,
            )  # fmt: skip
        transform = None
        if scheme.transforms:
            transform = _transform(layer, fit, *stacked_pairs(layer, [ranges[name] for name in names]))
        leading = leading_shape(layer.weight)
        replace(watched, path, Searched(layer, leading, transform, scheme.activation.grid, search))
    return watched


def _transform(layer: Linear | Conv, fit, low, high) -> InputTransform:
    """The transform that the layer will have, or a stack of them."""

    def one(weight, low, high):
        # What acts on channels sees one row a position of a kernel: [out, in, *kernel] -> [(out kernel), in]
        rows = jnp.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1])
        return fit.fit(rows.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high).arrays()

    arguments = (layer.weight[...], low, high)
    arrays = jax.lax.map(lambda a: one(*a), arguments) if leading_shape(layer.weight) else one(*arguments)
    return InputTransform(**arrays, rotation=fit.rotation)
