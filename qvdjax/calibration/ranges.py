"""The smallest and largest value of every input channel of every layer, over a calibration set."""

from collections.abc import Hashable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.calibration.steps import of_one_timestep
from qvdjax.calibration.watching import Kept, Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, Linear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, own_shape, replace
from qvdjax.parallel import to_host


class Watched(Watcher):
    """A layer that keeps the range of each input channel of its last call.

    Attributes:
        low, high: [in] each, over all other axes.
    """

    def __init__(self, layer: Linear | Conv, leading: tuple[int, ...], width: int):
        super().__init__(layer)
        self.low = Statistic(jnp.full((*leading, width), jnp.inf, jnp.float32), axes=(None,))
        self.high = Statistic(jnp.full((*leading, width), -jnp.inf, jnp.float32), axes=(None,))

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        others = tuple(range(x.ndim - 1))
        self.low[...] = jnp.minimum(self.low[...], x.min(axis=others).astype(jnp.float32))
        self.high[...] = jnp.maximum(self.high[...], x.max(axis=others).astype(jnp.float32))


def watch(model: VideoModel) -> VideoModel:
    """A copy of a float model whose linear and convolution layers are Watched."""
    model = nnx.clone(model)
    for _, path, layer in layers_of(model, (Linear, Conv)):
        _, width, *_ = own_shape(layer.weight)
        replace(model, path, Watched(layer, leading_shape(layer.weight), width))
    return model


_observe = jax.jit(observe)


def input_ranges(model: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, tuple]:
    """Ranges of every layer's input channels over all batches.

    Args:
        model: A float model, on one device or sharded.
        batches: Keyword arguments of the model's call: latents, timestep, context and further conditions.

    Returns:
        Name of the layer in diffusers -> (low [in], high [in]), NumPy float32.

    Raises:
        UserError: No batch at all, or ranges that are not finite.
    """
    (ranges,) = _ranges(model, ((None, inputs) for inputs in batches)).values()
    return ranges


def input_ranges_by_timestep(model: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, tuple]:
    """As `input_ranges`, of each timestep of the calibration set on its own.

    Returns:
        Name of the layer in diffusers -> (low [timesteps, in], high [timesteps, in]), timesteps ascending as
        `qvdjax.calibration.steps.timesteps_of` has them.
    """
    found = _ranges(model, of_one_timestep(batches))
    each = [found[timestep] for timestep in sorted(found)]
    return {name: tuple(map(np.stack, zip(*(one[name] for one in each), strict=True))) for name in each[0]}


def _ranges(model: VideoModel, batches: Iterable[tuple[Hashable, Mapping[str, jax.Array]]]) -> dict[Hashable, dict]:
    """The ranges of all batches of a key, by key."""
    watched, totals = watch(model), {}
    for key, inputs in batches:
        new = jax.tree.map(to_host, _observe(watched, dict(inputs)))
        totals[key] = new if key not in totals else _wider(totals[key], new)
    if not totals:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    found: dict[Hashable, dict] = {}
    for key, total in totals.items():
        ranges = found.setdefault(key, {})
        for names, kept in by_layer(watched, total):
            edges = (np.reshape(kept[edge], (len(names), -1)) for edge in ("low", "high"))  # [layers,] in -> layers in
            ranges.update(zip(names, zip(*edges, strict=True), strict=True))
        if broken := [name for name, edges in ranges.items() if not np.isfinite(edges).all()]:
            raise UserError(
                "calibration met values that are not finite", remedy="check the calibration set", items=broken
            )
    return found


def _wider(a: Kept, b: Kept) -> Kept:
    """The union of two sets of ranges of equal structure."""
    pick = {"low": np.minimum, "high": np.maximum}
    return jax.tree_util.tree_map_with_path(lambda path, x, y: pick[path[-1].key](x, y), a, b)
