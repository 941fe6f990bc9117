"""At which sampling steps inputs get more bits: where the prediction has changed much since they last did."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.dataset import CalibrationSet, Trajectory
from qvdjax.errors import UserError
from qvdjax.nn import BitSwitch, Linear, VideoModel, layers_of


@dataclasses.dataclass(frozen=True)
class SwitchBits:
    """DVD-Quant's guided switching of bits (arXiv 2505.18663, section 3.4).

    Over the steps of a sampler the relative changes of the prediction, |F_t - F_t-1| / |F_t-1| in the 1-norm, are added
    up. While the sum is below a threshold inputs keep the recipe's bits; the step at which it is reached has more, and
    the sum begins anew.

    The source decides while it samples. Here the full-precision model's predictions at the calibration set's inputs
    decide beforehand, with the changes averaged over its samples, so that what is compiled does not depend on a
    prediction, and the same steps are fine for every prompt and for both guidance branches.

    Attributes:
        threshold: delta. The source tries 0.06 to 0.18.
        bits: Of the fine steps.
    """

    threshold: float
    bits: int = 8

    def __post_init__(self):
        if not self.threshold > 0:
            raise ValueError(f"the threshold of changes must be positive, not {self.threshold}")

    def fine(self, changes: Iterable[float]) -> list[bool]:
        """Relative changes from step to step, one fewer than steps -> whether each step is fine; the first is not."""
        total, chosen = 0.0, [False]
        for change in changes:
            total += change
            chosen.append(bool(total >= self.threshold))  # changes may be numpy's
            total = 0.0 if chosen[-1] else total
        return chosen


def with_switched_bits(
    model: VideoModel, schemes: Mapping[str, Any], calibration: CalibrationSet, how: SwitchBits
) -> dict[str, Any]:
    """The schemes with the steps at which the inputs of linear layers, of dynamic ranges, get more bits.

    Raises:
        UserError: `calibration` is no CalibrationSet, whose steps follow one another, or its samples have different
            timesteps.
    """
    if not isinstance(calibration, CalibrationSet):
        raise UserError(
            "bits are switched by how predictions change from step to step, which these batches do not tell",
            remedy="make a calibration set with `qvdjax calibrate`",
        )
    samples = [calibration.trajectory(number) for number in range(len(calibration))]
    timesteps = samples[0].timestep
    if any(not np.array_equal(sample.timestep, timesteps) for sample in samples):
        raise UserError("the calibration set's samples have different timesteps", remedy="calibrate with one sampler")
    changes = np.mean([_changes(model, sample) for sample in samples], axis=0)
    steps = sorted(zip(map(float, timesteps), how.fine(changes), strict=True))
    switch = BitSwitch(how.bits, *map(tuple, zip(*steps, strict=True)))
    reason = f"inputs of {how.bits} bits at {sum(switch.fine)} of {len(steps)} timesteps"
    switched = dict(schemes)
    for name in (name for names, _, _ in layers_of(model, (Linear,)) for name in names):
        activation = schemes[name].activation
        if activation is not None and activation.dynamic and activation.bits < how.bits:
            switched[name] = dataclasses.replace(
                schemes[name], switch=switch, reason=f"{schemes[name].reason}; {reason}"
            )
    return switched


def _changes(model: VideoModel, sample: Trajectory) -> np.ndarray:
    """Relative 1-norm of how the prediction with the prompt changes between neighbouring steps, (steps - 1,)."""
    steps = len(sample.timestep)
    each = sample.inputs(range(steps), batch=1)  # those with the prompt come first
    predictions = np.stack([np.asarray(_predict(model, next(each))) for _ in range(steps)])
    axes = tuple(range(1, predictions.ndim))
    before = np.abs(predictions[:-1]).sum(axis=axes)
    return np.abs(np.diff(predictions, axis=0)).sum(axis=axes) / np.maximum(before, np.finfo(before.dtype).tiny)


@jax.jit
def _predict(model: VideoModel, inputs: dict) -> jax.Array:
    return model(**inputs).astype(jnp.float32)
