"""What a quantizer is: bits, grid, granularity, and how its range is chosen."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.numerics.extremes import largest, smallest
from qvdjax.numerics.grid import Grid
from qvdjax.numerics.refinement import refined

Granularity = Literal["tensor", "channel", "token", "group", "frame", "step"]


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """A uniform quantizer of the last axes of an array.

    Arrays are read as [..., rows, width]: weights are [..., out, in], activations [..., tokens, channels], and
    `width` is always the axis that a product contracts. Leading axes (layers of a stack, batch) never share a range.

    Attributes:
        bits: 2 to 8.
        symmetric: No zero point.
        granularity: One range for the last two axes ("tensor"), for each row ("channel" for the output channels
            of a weight, "token" for activations: the same thing under the name that fits), or for each
            `group_size` neighbours within a row ("group"). Activations only, and static: for each frame of a video,
            the same for all samples of a batch ("frame"; `qvdjax.nn.frames`), or for each timestep ("step").
        group_size: Width of a group; must divide the width of every array it meets.
        dynamic: Activations only: the range is taken from each input (True) or from calibration (False).
        range_method: "minmax" covers every value; "search" shrinks the range to the one with the smallest
            `range_norm` error (QVD's released calibration uses the 2.4 norm); "refine" begins there and goes on to the
            scale and zero point of least squared error (DVD-Quant, `qvdjax.numerics.refinement`).
        range_norm: Exponent of the searched error.
        codebook: Levels that are not evenly spaced (`qvdjax.numerics.codebook`), scaled by the root mean square of the
            values that share a range; "float8_e4m3fn" for floating-point numbers, scaled by their largest; None for an
            even grid. Symmetric, "minmax", and for activations dynamic.
        frames: Of granularity "frame", how many there are; None until calibration has counted them.
        timesteps: Of granularity "step", those that have ranges, ascending; a call at another one takes the nearest's.
            None until calibration has met them.
    """

    bits: int
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None
    dynamic: bool = False
    range_method: Literal["minmax", "search", "refine"] = "minmax"
    range_norm: float = 2.4
    codebook: str | None = None
    frames: int | None = None
    timesteps: tuple[float, ...] | None = None

    def __post_init__(self):
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size belongs to granularity 'group', and only to it")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be positive, not {self.group_size}")
        if self.granularity not in get_args(Granularity):
            raise ValueError(f"unknown granularity {self.granularity!r}")
        if self.granularity in ("frame", "step") and self.dynamic:
            raise ValueError("ranges of frames and of timesteps are static")
        if self.timesteps is not None and (self.granularity != "step" or not self.timesteps):
            raise ValueError("timesteps, at least one, belong to granularity 'step', and only to it")
        if self.frames is not None and (self.granularity != "frame" or self.frames < 1):
            raise ValueError("frames, at least one, belong to granularity 'frame', and only to it")
        if self.range_method not in ("minmax", "search", "refine"):
            raise ValueError(f"unknown range_method {self.range_method!r}")
        if self.codebook is not None and (self.range_method != "minmax" or not self.symmetric):
            raise ValueError("a codebook is symmetric and has no range to search")
        _ = self.grid

    @property
    def static_ranges(self) -> int:
        """How many ranges a static quantizer of a whole input has."""
        return self.frames or len(self.timesteps or (1,))

    @property
    def grid(self) -> Grid:
        """The integer grid."""
        return Grid(self.bits, self.symmetric, self.codebook)

    def to_dict(self) -> dict:
        """Plain fields, for a config file."""
        return dataclasses.asdict(self)

    def split_groups(self, x: jax.Array) -> jax.Array:
        """[..., rows, width] -> [..., rows, groups, group_size] (one group where there are none).

        Raises:
            ValueError: The width is no multiple of `group_size`.
        """
        size = self.group_size or x.shape[-1]
        if x.shape[-1] % size:
            raise ValueError(f"width {x.shape[-1]} is no multiple of the group size {size}")
        return rearrange(x, "... (groups size) -> ... groups size", size=size)

    def range_of(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Smallest and largest value for each range: x [..., rows, width] -> two [..., rows or 1, groups]."""
        low, high = (f(self.split_groups(x), -1) for f in (smallest, largest))  # [..., rows, groups]
        if self.granularity == "tensor":
            low, high = smallest(low, -2)[..., None, :], largest(high, -2)[..., None, :]  # [..., 1, groups]
        return low, high

    def scale_of(
        self, x: jax.Array, clip: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point for x [..., rows, width]: each [..., rows or 1, groups]; no zero point if symmetric.

        `clip` narrows the range: factors of its low and its high end, each broadcastable to [..., rows or 1, groups].
        """
        if self.grid.by_deviation:
            wide = self.split_groups(x.astype(jnp.promote_types(x.dtype, jnp.float32)))
            mean = self._total(jnp.square(wide)) / self._total(jnp.ones_like(wide))
            deviation = jnp.sqrt(mean)[..., 0]
            return self.grid.from_deviation(deviation if clip is None else deviation * clip[1]), None
        if self.symmetric and self.range_method == "minmax" and clip is None:
            return self._scale_of_largest(x), None
        low, high = self.range_of(x)
        if self.range_method != "minmax":
            low, high = self._search(x, low, high)
        if clip is not None:
            low, high = low * clip[0], high * clip[1]
        parameters = self.grid.from_range(low, high)
        if self.range_method != "refine":
            return self._with_nan(x, parameters[0]), parameters[1]
        groups, (scale, zero_point) = self.split_groups(x), parameters
        scale, zero_point = (None if a is None else a[..., None] for a in (scale, zero_point))
        best = refined(groups.astype(scale.dtype), self.grid, scale, zero_point, self._total)
        return tuple(None if a is None else a[..., 0] for a in best)

    def _scale_of_largest(self, x: jax.Array) -> jax.Array:
        """What `Grid.from_range` makes of the same values, from one reduction: a compiler puts one, not several, into
        the product that makes x. NaN where x has one or an infinity, see `_with_nan`."""
        size = largest_magnitude(self.split_groups(x), axis=-1)  # [..., rows, groups]
        if self.granularity == "tensor":
            size = size.max(axis=-2, keepdims=True)
        return self.grid.from_largest(size)

    def _with_nan(self, x: jax.Array, scale: jax.Array) -> jax.Array:
        """The scale, or NaN where x has one: integers cannot say it, and on CPU the largest of numbers and NaN is a
        number."""
        spoilt = jnp.isnan(self.split_groups(x)).any(axis=-1)  # [..., rows, groups]
        if self.granularity == "tensor":
            spoilt = spoilt.any(axis=-2, keepdims=True)
        return jnp.where(spoilt, jnp.nan, scale)

    def _total(self, groups: jax.Array) -> jax.Array:
        """Sum over the values that share a range: [..., rows, groups, size] -> [..., rows or 1, groups, 1]."""
        return groups.sum(axis=(-3, -1) if self.granularity == "tensor" else -1, keepdims=True)

    def _search(self, x: jax.Array, low: jax.Array, high: jax.Array, candidates: int = 80) -> tuple:
        """The best of `candidates` even shrinkings of [low, high] from 1/candidates to 1, for each range on its own.

        80 candidates is the step of the released QVD search; the full range is always among them.
        """
        grid, groups = self.grid, self.split_groups(x)

        def error(ratio):
            scale, zero_point = grid.from_range(low * ratio, high * ratio)
            scale_, zero_ = (None if a is None else a[..., None] for a in (scale, zero_point))
            real = grid.decode(grid.encode(groups, scale_, zero_), scale_, zero_)
            total = (jnp.abs(real - groups) ** self.range_norm).sum(axis=-1)  # [..., rows, groups]
            return total.sum(axis=-2, keepdims=True) if self.granularity == "tensor" else total

        def keep_better(best, ratio):
            best_error, best_ratio = best
            new = error(ratio)
            return (jnp.minimum(new, best_error), jnp.where(new < best_error, ratio, best_ratio)), None

        ratios = jnp.arange(candidates - 1, 0, -1, dtype=low.dtype) / candidates
        start = (error(jnp.ones((), low.dtype)), jnp.ones_like(low))
        (_, ratio), _ = jax.lax.scan(keep_better, start, ratios)
        return low * ratio, high * ratio


def largest_magnitude(x: jax.Array, axis, keepdims: bool = False) -> jax.Array:
    """The largest |x| over axes; infinity where there is a NaN, which a maximum on CPU would pass over."""
    return jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x)).max(axis=axis, keepdims=keepdims)
