"""Which sampling steps a calibration set holds, and the inputs of the first."""

from collections.abc import Iterable, Iterator, Mapping

import jax
import numpy as np


def timesteps_of(batches: Iterable[Mapping[str, jax.Array]]) -> list[float]:
    """The timesteps of a calibration set, each once, ascending.

    Where tokens of a sample have timesteps of their own, its largest counts.
    """
    return sorted({float(t) for inputs in batches for t in of_samples(inputs)})


def first_steps(batches: Iterable[Mapping[str, jax.Array]]) -> Iterator[dict[str, np.ndarray]]:
    """The samples of a calibration set at its largest timestep, where sampling begins; goes over the set twice."""
    largest = np.float32(timesteps_of(batches)[-1])
    for inputs in batches:
        rows = np.flatnonzero(of_samples(inputs) == largest)
        if len(rows):
            yield {name: np.asarray(array)[rows] for name, array in inputs.items()}


def of_samples(inputs: Mapping[str, jax.Array]) -> np.ndarray:
    """The timestep of each sample of a batch, float32 (batch,)."""
    timestep = np.asarray(inputs["timestep"], np.float32)
    return timestep if timestep.ndim == 1 else timestep.max(axis=1)  # (batch, tokens) -> (batch,)
