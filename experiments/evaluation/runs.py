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
            solver=setup.solver,
            steps=setup.steps,
            guidance_scale=setup.guidance_scale,
            trajectory=True,
        )
        inputs.append(np.asarray(result.trajectory, np.float32)[:, :wanted])
        ends.append(np.asarray(result.latents, np.float32)[:wanted])
        progress(int(rows[wanted - 1]) + 1)
    return FreeRun(np.concatenate(inputs, axis=1), np.concatenate(ends))


def predict_along(
    model, inputs: np.ndarray, setup: Setup, *, batch: int, place: Place, progress: Callable[[int], None]
) -> np.ndarray:
    """The model's velocity after guidance at given latents: what teacher forcing compares.

    Reference and candidate both go through this one compiled function, so that a candidate equal to its
    reference has an error of exactly zero.

    Args:
        inputs: (steps, samples, frames, height, width, channels), the latents of each step of `setup`.

    Returns:
        float32, shaped as `inputs`.
    """
    timesteps = np.asarray(setup.solver.schedule(setup.steps).timesteps, np.float32)
    velocities = []
    for rows, wanted in _chunks(len(setup.seeds), batch):
        chunk = _along(
            setup.unguided,
            model,
            place(np.swapaxes(inputs[:, rows], 0, 1)),  # steps batch ... -> batch steps ...
            timesteps,
            place(setup.context[rows]),
            None if setup.unguided else place(setup.negative_context[rows]),
            np.float32(setup.guidance_scale),
        )
        velocities.append(np.asarray(chunk, np.float32)[:, :wanted])
        progress(int(rows[wanted - 1]) + 1)
    return np.concatenate(velocities, axis=1)


def _scan_along(unguided: bool, model, inputs, timesteps, context, negative_context, guidance_scale) -> jax.Array:
    predict = guided(model, 1 if unguided else guidance_scale)

    def body(_, row):
        latents, timestep = row
        timestep = jnp.full(latents.shape[:1], timestep, jnp.float32)  # () -> (batch,)
        return None, predict(latents, timestep, context, negative_context)

    by_step = jnp.swapaxes(inputs, 0, 1)  # batch steps ... -> steps batch ...
    return jax.lax.scan(body, None, (by_step, timesteps))[1]


_along = jax.jit(_scan_along, static_argnums=0)


def _chunks(count: int, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """Row numbers `batch` at a time, and how many of them are wanted.

    The last chunk is filled up with its last row: another batch size would be another compilation.
    """
    batch = min(batch, count)
    for start in range(0, count, batch):
        rows = np.minimum(np.arange(start, start + batch), count - 1)
        yield rows, min(batch, count - start)
