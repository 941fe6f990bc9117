"""A solver's steps and a diffusers scheduler's, driven by the same prediction in float64."""

import jax
import numpy as np
import pytest


def run_ours(solver, steps, predict, noise, seeds=None):
    """Schedule, and the latents after every step, float64; `predict(latents, timestep)` is NumPy."""
    with jax.enable_x64(True):
        schedule = solver.schedule(steps)
        start = () if seeds is None else (seeds,)
        state, outputs = solver.init(jax.numpy.asarray(noise), *start), []
        for index in range(steps):
            row = schedule.row(index)
            state = solver.step(row, state, predict(np.asarray(state.latents), float(row.timesteps)))
            outputs.append(np.asarray(state.latents))
        assert outputs[-1].dtype == np.float64
    return schedule, np.stack(outputs)


def run_diffusers(scheduler, predict, noise):
    """Latents after every step of a diffusers scheduler whose timesteps are set."""
    torch = pytest.importorskip("torch")
    latents, outputs = torch.from_numpy(noise), []
    for timestep in scheduler.timesteps:
        prediction = torch.from_numpy(predict(latents.numpy(), float(timestep)))
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
        outputs.append(latents.numpy())
    return np.stack(outputs)


def relative_error(ours, theirs):
    """Of all steps together."""
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
