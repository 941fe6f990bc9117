"""Static ranges of layers' inputs by search in each call of a calibration set (QVD's activation ranges)."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.steps import of_one_timestep, timesteps_of
from qvdjax.calibration.watching import Kept, Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, InputTransform, LayerScheme, Linear, Statistic, VideoModel, layers_of
from qvdjax.nn.frames import by_frame
from qvdjax.nn.variables import leading_shape, replace, shallow_copy
from qvdjax.numerics import Grid
from qvdjax.parallel import to_host
from qvdjax.ptq.apply import Fitted, stacked_rows
from qvdjax.ptq.layers import split_channels

Shape = Literal["minmax", "magnitude", "shrink"]
OverCalls = Literal["mean", "widest"]
_SHRINKINGS = np.arange(100, 49, -1) / 100


@dataclasses.dataclass(frozen=True)
class RangeSearch:
    """How the static range of an input follows from what calibration sees.

    Each call, a batch of the calibration set, gives a range of its own, and `over_calls` says which the layer has. Read
    in PaddleSlim `example/QVD/QDrop/quant/UniformAffineQuantizer.py`.

    Attributes:
        shape: Of ranges of a tensor; frames have "shrink" but where it is "minmax".
            "minmax": from the smallest to the largest value.
            "magnitude": the [-T, T] of least error, T = max|x| i / `candidates`; one-sided where no value changes sign.
            As released for ranges of a tensor. Zero then lies between two codes; here the whole range is moved by half
            a step, so that it is a code, where the release leaves to rounding errors which of the two it becomes.
            "shrink": the smallest and the largest value times the factor of least error, in steps of 0.01 from 1 to
            0.5. As released for ranges of frames.
        norm: Exponent of the error.
        candidates: Of "magnitude".
        over_calls: "mean", as released, is the mean of the ranges, which clips the calls whose inputs are larger than
            on average. "widest" reaches from the smallest of the lower ends to the largest of the upper.
    """

    shape: Shape = "magnitude"
    norm: float = 2.4
    candidates: int = 50
    over_calls: OverCalls = "mean"

    def __post_init__(self):
        if self.shape not in get_args(Shape):
            raise ValueError(f"unknown shape of ranges {self.shape!r}: use one of {', '.join(get_args(Shape))}")
        if self.over_calls not in get_args(OverCalls):
            raise ValueError(f"unknown range over calls {self.over_calls!r}: use {' or '.join(get_args(OverCalls))}")
        if self.norm <= 0 or self.candidates < 1:
            raise ValueError(f"a search needs a positive norm and a candidate, not {self.norm} and {self.candidates}")

    def edges_by_frame(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
        """x [batch, frames, values] -> smallest and largest value of each frame's range, [frames] each.

        A frame's ends are those of its samples on average (the release has two: with the prompt and without); all
        frames are narrowed by one factor.
        """
        low, high = x.min(axis=-1).mean(axis=0), x.max(axis=-1).mean(axis=0)  # [batch, frames, values] -> [frames]
        if self.shape == "minmax":
            return low, high
        best = self._best(_SHRINKINGS, x, low[:, None], high[:, None], grid)
        return low * best, high * best

    def edges(self, x: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
        """x [...] -> smallest and largest value of its range, [] each."""
        low, high = x.min(), x.max()
        if self.shape == "minmax":
            return low, high
        if self.shape == "magnitude":
            largest = jnp.maximum(-low, high)
            half_a_step = jnp.where((low < 0) & (high > 0), largest / (2**grid.bits - 1), 0)
            low, high = jnp.where(low < 0, -largest, 0) - half_a_step, jnp.where(high > 0, largest, 0) - half_a_step
            ratios = np.arange(self.candidates, 0, -1) / self.candidates
        else:
            ratios = _SHRINKINGS
        best = self._best(ratios, x, low, high, grid)
        return low * best, high * best

    def of_all_calls(self, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends of each call's range, [calls, ...] each -> those of the layer's, [...]."""
        if self.over_calls == "mean":
            return low.mean(axis=0), high.mean(axis=0)
        return low.min(axis=0), high.max(axis=0)

    def _best(self, ratios, x, low, high, grid: Grid) -> jax.Array:
        """The factor of least error for ends [low, high] that broadcast against x."""

        def error(ratio):
            scale, zero_point = grid.from_range(low * ratio, high * ratio)
            real = grid.decode(grid.encode(x, scale, zero_point), scale, zero_point)
            return _power(jnp.abs(real - x), self.norm).mean()

        ratios = jnp.asarray(ratios, x.dtype)
        return ratios[jax.lax.map(error, ratios).argmin()]  # the widest of equals


def _power(x: jax.Array, exponent: float) -> jax.Array:
    """x of at least zero to a positive power: most of what a search costs; XLA's own takes twice as long on a CPU."""
    if exponent == 2:
        return jnp.square(x)
    return jnp.exp(exponent * jnp.log(x))  # exp(-inf) is 0, and NaN stays


class Searched(Watcher):
    """A layer that keeps the range that is best for the transformed input of its last call.

    Attributes:
        low, high: [ranges]: of each frame, of each part of the input, or one.
        transform: What the input passes through, or None.
    """

    def __init__(
        self, layer: Linear | Conv, leading: tuple[int, ...], transform: InputTransform | None, grid: Grid,
        search: RangeSearch, frames: int | None = None, split: tuple[int, ...] | None = None,
    ):  # fmt: skip
        super().__init__(layer)
        zeros = jnp.zeros((*leading, frames or len(split or (1,))), jnp.float32)
        self.low, self.high = (Statistic(zeros, axes=(None,)) for _ in range(2))
        self.transform, self.grid, self.search, self.frames, self.split = transform, grid, search, frames, split

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        x = x if self.transform is None else self.transform(x)
        if self.frames is None:
            edges = [self.search.edges(part, self.grid) for part in split_channels(x, self.split)]
            low, high = (jnp.stack(ends) for ends in zip(*edges, strict=True))
        else:
            low, high = self.search.edges_by_frame(by_frame(x, self.layer.frame_axis, self.frames), self.grid)
        self.low[...], self.high[...] = low.astype(jnp.float32), high.astype(jnp.float32)


def search_ranges(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], search: RangeSearch, *,
    fit=None, ranges: Mapping[str, tuple] | None = None, fitted: Fitted | None = None,
) -> dict[str, tuple]:  # fmt: skip
    """The edges of every static range, by name in diffusers, for `apply_schemes`: float32 [ranges] twice.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name. Blocks of one stack may differ in which of them are quantized.
        batches: Keyword arguments of the model's call.
        search: How ranges are found.
        fit, ranges, fitted: Of the transforms, as `apply_schemes` takes them.

    Raises:
        UserError: No batch, or batches of different numbers of frames; blocks of one stack with different quantizers
            of their inputs; values that are not finite.
    """
    watched, by_step = None, any(_static(s) and s.activation.granularity == "step" for s in schemes.values())
    calls: dict[float | None, list[Kept]] = {}  # of each timestep, or of all
    for timestep, inputs in of_one_timestep(batches) if by_step else ((None, inputs) for inputs in batches):
        frames = inputs["latents"].shape[1]
        if watched is None:
            watched, counted = _watch(model, schemes, search, fit, ranges, fitted, frames), frames
        elif frames != counted:
            raise UserError(
                f"calibration inputs of {counted} frames and of {frames}", remedy="calibrate with one number of frames"
            )
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs)))
        calls.setdefault(timestep, []).append(new)
    if not calls:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    edges: dict[str, tuple] = {}
    for timestep in sorted(calls):  # one alone where they are not told apart
        for names, kept in by_layer(watched, jax.tree.map(lambda *each: np.stack(each), *calls[timestep])):
            ends = search.of_all_calls(kept["low"], kept["high"])  # calls [layers,] ranges -> [layers,] ranges
            pairs = (end.reshape(len(names), -1).astype(np.float32) for end in ends)  # -> layers ranges
            for name, pair in zip(names, zip(*pairs, strict=True), strict=True):
                if _static(schemes[name]):
                    before = edges.get(name)
                    edges[name] = pair if before is None else tuple(map(np.append, before, pair))
    if broken := [name for name, pair in edges.items() if not np.isfinite(pair).all()]:
        raise UserError("calibration met values that are not finite", remedy="check the calibration set", items=broken)
    return edges


_observe = jax.jit(observe)


def _static(scheme) -> bool:
    return isinstance(scheme, LayerScheme) and scheme.activation is not None and not scheme.activation.dynamic


def with_counts(
    schemes: Mapping[str, Any], edges: Mapping[str, tuple], batches: Iterable[Mapping[str, jax.Array]]
) -> dict[str, Any]:
    """The schemes with what searched ranges, by name, are of, where frames or timesteps have their own: the number of
    frames, or the timesteps of the calibration set."""
    counted, timesteps = dict(schemes), None
    for name, (low, _) in edges.items():
        activation = schemes[name].activation
        if activation.granularity == "frame":
            activation, what = dataclasses.replace(activation, frames=len(low)), "frames"
        elif activation.granularity == "step":
            timesteps = timesteps or tuple(timesteps_of(batches))
            activation, what = dataclasses.replace(activation, timesteps=timesteps), "timesteps"
        else:
            continue
        reason = f"{schemes[name].reason}; each of {len(low)} {what} has a range of its own"
        counted[name] = dataclasses.replace(schemes[name], activation=activation, reason=reason)
    return counted


def _watch(model, schemes, search: RangeSearch, fit, ranges, fitted, frames: int) -> VideoModel:
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
        transform = transform_of(layer, names, scheme, fit, ranges, fitted)
        leading = leading_shape(layer.weight)
        own = frames if scheme.activation.granularity == "frame" else None
        replace(watched, path, Searched(layer, leading, transform, scheme.activation.grid, search, own, scheme.split))
    return watched


def transform_of(
    layer: Linear | Conv, names: list[str], scheme: LayerScheme, fit, ranges: Mapping[str, tuple] | None,
    fitted: Fitted | None = None,
) -> InputTransform | None:  # fmt: skip
    """The transform that a layer of these names, one a block, will have, or a stack of them; arguments as of
    `search_ranges`."""
    if not scheme.transforms:
        return None
    if fitted is not None:
        return InputTransform.of(scheme, stacked_rows(layer, [fitted[name] for name in names]))
    return InputTransform.of(scheme, _arrays(layer, fit, *stacked_rows(layer, [ranges[name] for name in names])))


def _arrays(layer: Linear | Conv, fit, low, high) -> dict[str, jax.Array]:
    """Those of the transform that the layer will have, or a stack of them."""

    def one(weight, low, high):
        # What acts on channels sees one row a position of a kernel: [out, in, *kernel] -> [(out kernel), in]
        rows = jnp.moveaxis(weight, 1, -1).reshape(-1, weight.shape[1])
        return fit.fit(rows.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high).arrays()

    arguments = (layer.weight[...], low, high)
    return jax.lax.map(lambda a: one(*a), arguments) if leading_shape(layer.weight) else one(*arguments)
