"""Which sampling steps a calibration set holds, and the inputs of some of them."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from qvdjax.errors import UserError
from qvdjax.nn import TimestepIntervals


def timesteps_of(batches: Iterable[Mapping[str, jax.Array]]) -> list[float]:
    """The timesteps of a calibration set, each once, ascending.

    Where tokens of a sample have timesteps of their own, its largest counts.
    """
    return sorted({float(t) for inputs in batches for t in of_samples(inputs)})


def first_steps(batches: Iterable[Mapping[str, jax.Array]]) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a calibration set at its largest timestep, where sampling begins; goes over the set twice."""
    largest = np.float32(timesteps_of(batches)[-1])
    return _where(batches, lambda timestep: timestep == largest)


def of_one_timestep(batches: Iterable[Mapping[str, jax.Array]]) -> Iterator[tuple[float, dict[str, np.ndarray]]]:
    """(timestep, its samples) of every batch."""
    for inputs in batches:
        timesteps = of_samples(inputs)
        for timestep in np.unique(timesteps):
            rows = np.flatnonzero(timesteps == timestep)
            yield float(timestep), {name: np.asarray(array)[rows] for name, array in inputs.items()}


@dataclasses.dataclass(frozen=True)
class InInterval:
    """The samples of a calibration set in one interval of timesteps, read anew each time.

    Attributes:
        batches: The set.
        intervals, number: Which it is.
    """

    batches: Iterable[Mapping[str, jax.Array]]
    intervals: TimestepIntervals
    number: int

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches; UserError at the end where there are none."""
        found = False
        for inputs in _where(self.batches, lambda timestep: np.asarray(self.intervals.of(timestep)) == self.number):
            found = True
            yield inputs
        if not found:
            raise UserError(
                f"the calibration set has no timestep from {self.intervals.name(self.number)}",
                remedy="calibrate with more steps, or choose fewer intervals",
            )


def _where(
    batches: Iterable[Mapping[str, jax.Array]], wanted: Callable[[np.ndarray], np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """The samples whose timesteps are wanted."""
    for inputs in batches:
        rows = np.flatnonzero(wanted(of_samples(inputs)))
        if len(rows):
            yield {name: np.asarray(array)[rows] for name, array in inputs.items()}


def of_samples(inputs: Mapping[str, jax.Array]) -> np.ndarray:
    """The timestep of each sample of a batch, float32 (batch,)."""
    timestep = np.asarray(inputs["timestep"], np.float32)
    return timestep if timestep.ndim == 1 else timestep.max(axis=1)  # (batch, tokens) -> (batch,)
