"""Two ways to run a model: freely from noise, and along another model's latents."""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from experiments.evaluation.setup import Setup
from qvdjax.diffusion import guided, sample

Place = Callable[[np.ndarray | jax.Array], jax.Array]
"""Puts an array with a leading batch axis where the model computes."""


@dataclasses.dataclass(frozen=True)
class FreeRun:
    """What sampling went through, in host memory.

    Attributes:
        inputs: Latents the model was given at each step, float32 (steps, samples, frames, height, width,
            channels).
        latents: Where it ended, float32 (samples, frames, height, width, channels).
    """

    inputs: np.ndarray
    latents: np.ndarray

    @property
    def path(self) -> np.ndarray:
        """Inputs and end as one array, (steps + 1, samples, frames, height, width, channels)."""
        return np.concatenate([self.inputs, self.latents[None]])


def run_freely(model, setup: Setup, *, batch: int, place: Place, progress: Callable[[int], None]) -> FreeRun:
    """Sample every prompt and seed, `batch` at a time. `progress` gets the number of samples done."""
    inputs, ends = [], []
    for rows, wanted in _chunks(len(setup.seeds), batch):
        result = sample(
            model,
            place(setup.context[rows]),
            None if setup.unguided else place(setup.negative_context[rows]),
            noise=place(setup.noise(rows)),
            seeds=[setup.seeds[row] for row in rows],
            trajectory=True,
            **{name: place(array[rows]) for name, array in setup.conditions.items()},
            **setup.sampling,
        )
        inputs.append(np.asarray(result.trajectory, np.float32)[:, :wanted])
        ends.append(np.asarray(result.latents, np.float32)[:wanted])
        progress(int(rows[wanted - 1]) + 1)
    return FreeRun(np.concatenate(inputs, axis=1), np.concatenate(ends))


def predict_along(
    model, inputs: np.ndarray, setup: Setup, *, batch: int, place: Place, progress: Callable[[int], None]
) -> np.ndarray:
    """The model's velocity after guidance at given latents: what teacher forcing compares.

    Steps that are not guided are predicted with the context alone, as sampling does it.

    Reference and candidate both go through this one compiled function, so that a candidate equal to its
    reference has an error of exactly zero.

    Args:
        inputs: (steps, samples, frames, height, width, channels), the latents of each step of `setup`.

    Returns:
        float32, shaped as `inputs`.
    """
    timesteps, scales = (np.asarray(numbers, np.float32) for numbers in (setup.timesteps, setup.scales))
    parts = [(slice(0, setup.guided_count), False), (slice(setup.guided_count, setup.steps), True)]
    velocities = []
    for rows, wanted in _chunks(len(setup.seeds), batch):
        context = place(setup.context[rows])
        conditions = {name: place(array[rows]) for name, array in setup.conditions.items()}
        chunk = [
            _along(
                unguided,
                model,
                place(np.swapaxes(inputs[steps][:, rows], 0, 1)),  # steps batch ... -> batch steps ...
                timesteps[steps],
                context,
                None if unguided else place(setup.negative_context[rows]),
                scales[steps],
                conditions,
            )
            for steps, unguided in parts
            if steps.start < steps.stop
        ]
        velocities.append(np.concatenate([np.asarray(part, np.float32)[:, :wanted] for part in chunk]))
        progress(int(rows[wanted - 1]) + 1)
    return np.concatenate(velocities, axis=1)


def _scan_along(unguided: bool, model, inputs, timesteps, context, negative, scales, conditions) -> jax.Array:
    def body(_, row):
        latents, timestep, scale = row
        timestep = jnp.full(latents.shape[:1], timestep, jnp.float32)  # () -> (batch,)
        predict = guided(model, 1 if unguided else scale)
        return None, predict(latents, timestep, context, negative, **conditions)

    by_step = jnp.swapaxes(inputs, 0, 1)  # batch steps ... -> steps batch ...
    return jax.lax.scan(body, None, (by_step, timesteps, scales))[1]


_along = jax.jit(_scan_along, static_argnums=0)


def _chunks(count: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers `batch` at a time, and how many of them are wanted.

    The last chunk is filled up with its last row: another batch size would be another compilation.
    """
    batch = min(batch, count)
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        yield rows, min(batch, count - start)
