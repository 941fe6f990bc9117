"""Free runs and teacher forcing with a model whose answers can be written down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.evaluation.runs import predict_along, run_freely
from experiments.evaluation.setup import Setup
from qvdjax.diffusion import get_solver


def answer(factor, latents, timestep, context):
    """factor * latents + the prompt's number + the timestep / 1000; one of each a sample."""
    offset = context[:, 0, 0] + timestep / 1000
    return factor * latents + offset[:, None, None, None, None]


def model(factor: float):
    return jax.tree_util.Partial(answer, jnp.float32(factor))


def setup(samples: int, steps: int = 3, guidance_scale: float = 2.0, **guidance) -> Setup:
    context = np.arange(samples, dtype=np.float32)[:, None, None] * np.ones((1, 2, 4), np.float32)
    return Setup(
        prompts=tuple(f"prompt {index}" for index in range(samples)),
        prompt_of_sample=tuple(range(samples)),
        seeds=tuple(range(samples)),
        context=context,
        negative_context=0.5 * context,
        latents_shape=(2, 3, 4, 5),
        solver=get_solver("euler", shift=1.0),
        steps=steps,
        guidance_scale=guidance_scale,
        pipeline=None,
        **guidance,
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_predictions_at_given_latents(batch):
    samples = setup(5)
    inputs = np.random.default_rng(0).standard_normal((3, 5, 2, 3, 4, 5)).astype(np.float32)
    done = []
    velocity = predict_along(model(0.5), inputs, samples, batch=batch, place=jnp.asarray, progress=done.append)
    # Guidance 2 on a term that is halved without the prompt: 0.5 c + 2 (c - 0.5 c) = 1.5 c.
    timesteps = np.asarray(samples.solver.schedule(3).timesteps)
    offset = timesteps[:, None] / 1000 + 1.5 * np.arange(5)[None, :]  # (steps, samples)
    # A handful of float32 operations on numbers below 10.
    np.testing.assert_allclose(velocity, 0.5 * inputs + offset[..., None, None, None, None], atol=1e-5)
    assert done[-1] == 5


def test_predictions_are_guided_as_sampling_guides():
    """Of timesteps 1000, 667 and 333 the first two are guided, at scales that rise with the step."""
    samples = setup(5, dynamic_guidance="step", guidance_until=500.0)
    assert samples.guided_count == 2
    inputs = np.random.default_rng(0).standard_normal((3, 5, 2, 3, 4, 5)).astype(np.float32)
    velocity = predict_along(model(0.5), inputs, samples, batch=2, place=jnp.asarray, progress=lambda done: None)
    # Scale 1 + 2 (1 - cos(pi (step / 3)^5)) / 2; 0.5 c + scale (c - 0.5 c) with guidance, c without.
    scales = [1.0, 1 + (1 - np.cos(np.pi / 243)), 1.0]
    offset = samples.timesteps[:, None] / 1000 + 0.5 * (1 + np.array(scales))[:, None] * np.arange(5)
    # A handful of float32 operations on numbers below 10.
    np.testing.assert_allclose(velocity, 0.5 * inputs + offset[..., None, None, None, None], atol=1e-5)
    run = run_freely(model(0.5), samples, batch=5, place=jnp.asarray, progress=lambda done: None)
    # At its own latents the model predicts what Euler, from sigma 1 by thirds, followed.
    again = predict_along(model(0.5), run.inputs, samples, batch=5, place=jnp.asarray, progress=lambda done: None)
    np.testing.assert_allclose(run.path[1:], run.path[:-1] - again / 3, atol=1e-5)


@pytest.mark.parametrize("batch", [2, 5])
def test_free_run_starts_at_each_seeds_noise_and_follows_the_model(batch):
    samples = setup(5, guidance_scale=1.0)
    run = run_freely(model(0.0), samples, batch=batch, place=jnp.asarray, progress=lambda done: None)
    assert run.inputs.shape == (3, 5, 2, 3, 4, 5)
    np.testing.assert_array_equal(run.inputs[0], np.asarray(samples.noise(np.arange(5))))
    # Velocity: context + timestep / 1000, timestep / 1000 = sigma = 1, 2/3, 1/3; Euler adds -1/3 of each.
    moved = -(np.arange(5) + (1 + 2 / 3 + 1 / 3) / 3)
    # Three float32 steps on numbers below 10.
    np.testing.assert_allclose(
        run.latents - run.inputs[0],
        np.broadcast_to(moved[:, None, None, None, None], run.latents.shape),
        atol=1e-5,
    )
    np.testing.assert_array_equal(run.path[:-1], run.inputs)
    np.testing.assert_array_equal(run.path[-1], run.latents)
