"""How large each input channel of a layer is at one sampling step, on average over steps."""

import functools
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from qvdjax.calibration.ranges import watch
from qvdjax.calibration.watching import Kept, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.parallel import to_host


@jax.jit
def _observe(model: VideoModel, inputs: Mapping[str, jax.Array]) -> Kept:
    """What the layers keep of each row of a batch, as if it came alone, with an axis of rows in front."""
    rows = jax.tree.map(lambda a: a[:, None], dict(inputs))  # batch ... -> batch 1 ...
    own = functools.partial(jax.tree.map, lambda a: a)  # a model whose layers may be written to in the loop
    return jax.lax.map(lambda row: observe(own(model), row), rows)


def input_magnitudes(model: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, tuple]:
    """The mean over model inputs of the largest magnitude that each input channel of a layer has in one of them.

    Args:
        model: A float model, on one device or sharded.
        batches: Keyword arguments of the model's call. Each row is one step of one prompt in one guidance branch.

    Returns:
        Name of the layer in diffusers -> (-mean [in], mean [in]), NumPy float32: where ranges of channels are taken,
        as `qvdjax.calibration.ranges.input_ranges` gives them.

    Raises:
        UserError: No batch at all, or inputs that are not finite.
    """
    watched, sums, rows = watch(model), {}, 0
    for inputs in batches:
        kept = jax.tree.map(to_host, _observe(watched, dict(inputs)))
        rows += len(inputs["latents"])
        for names, found in by_layer(watched, kept):
            # [rows, [layers,] in] -> [layers, in]
            largest = np.maximum(-found["low"], found["high"]).astype(np.float64).sum(axis=0)
            for name, row in zip(names, largest.reshape(len(names), -1), strict=True):
                sums[name] = sums.get(name, 0) + row
    if not rows:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    if broken := [name for name, row in sums.items() if not np.isfinite(row).all()]:
        raise UserError("calibration met values that are not finite", remedy="check the calibration set", items=broken)
    means = {name: (row / rows).astype(np.float32) for name, row in sums.items()}
    return {name: (-row, row) for name, row in means.items()}
