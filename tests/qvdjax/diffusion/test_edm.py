"""Euler's method with EDM's preconditioning against diffusers' scheduler as Stable Video Diffusion has it."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_runs import relative_error, run_ours

from qvdjax.diffusion import EulerEDM, get_solver, related_solver, sample
from qvdjax.errors import UserError

SVD = {
    "prediction_type": "v_prediction", "timestep_type": "continuous", "timestep_spacing": "leading",
    "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "beta_end": 0.012, "interpolation_type": "linear", "steps_offset": 1,
}  # fmt: skip
RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4, 6, 5)  # batch, frames, height, width, channels
NOISE = RNG.standard_normal(SHAPE)
MIX, PUSH = RNG.standard_normal((5, 5)) * 0.35, RNG.standard_normal(SHAPE[1:])


def model(latents, timestep):
    """A fixed random linear model, with a gain that depends on time; NumPy float64."""
    return (latents @ MIX + PUSH) * (0.7 + 0.3 * np.sin(3 * timestep))


def run_diffusers(scheduler):
    """What the model sees at every step, and the final latents: the loop of diffusers' pipeline."""
    torch = pytest.importorskip("torch")
    latents, seen = torch.from_numpy(NOISE) * scheduler.init_noise_sigma, []
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(latents, timestep)
        seen.append(scaled.numpy())
        prediction = torch.from_numpy(model(scaled.numpy(), float(timestep)))
        latents = scheduler.step(prediction, timestep, latents, return_dict=False)[0]
    return np.stack([*seen, latents.numpy()])


@pytest.mark.parametrize("steps", [1, 2, 10, 25])
def test_it_equals_diffusers(steps, monkeypatch):
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(**SVD)
    # It rounds x, of size 700, to float32 at every step, of which two steps leave 4e-5; here it is kept in float64.
    torch = pytest.importorskip("torch")
    wide = types.SimpleNamespace(**{**vars(torch), "float32": torch.float64})
    monkeypatch.setattr("diffusers.schedulers.scheduling_euler_discrete.torch", wide)
    scheduler.set_timesteps(steps)
    schedule, ours = run_ours(EulerEDM(), steps, model, NOISE)
    # Its noise levels and their logarithms are float32 even so: off by 6e-8 of each.
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=0, atol=3e-7)
    for our, their in zip([NOISE, *ours], run_diffusers(scheduler), strict=True):
        assert relative_error(our, their) <= 1e-6


def test_it_equals_diffusers_as_it_is():
    scheduler = pytest.importorskip("diffusers").EulerDiscreteScheduler(**SVD)
    scheduler.set_timesteps(25)
    _, ours = run_ours(EulerEDM(), 25, model, NOISE)
    # Of many small steps the rounding of x to float32, 6e-8 each, leaves little.
    assert relative_error(np.stack([NOISE, *ours]), run_diffusers(scheduler)) <= 1e-6


def test_known_timesteps():
    """Of ten steps, written down when the scheduler was studied."""
    timesteps = EulerEDM().schedule(10).timesteps
    np.testing.assert_allclose(timesteps[[0, 1, -1]], [1.6378, 1.4666, -1.5537], atol=5e-5)
    assert (np.diff(timesteps) < 0).all()


@given(st.integers(1, 60), st.floats(0.001, 0.1), st.floats(1.0, 1000.0), st.floats(1.0, 9.0))
@settings(max_examples=20, deadline=None)
def test_a_model_that_knows_the_video_leads_there(steps, least, most, rho):
    clean = NOISE[::-1]

    def knows(latents, timestep):
        sigma = np.exp(4 * timestep)
        noise = (latents * np.sqrt(sigma**2 + 1) - clean) / sigma
        return (noise - sigma * clean) / np.sqrt(sigma**2 + 1)

    _, ours = run_ours(EulerEDM(least, most, rho), steps, knows, NOISE)
    # float64; a noise level of 0.001 is divided by, and one of 1000 takes three of sixteen digits.
    assert relative_error(ours[-1], clean) <= 1e-8


def test_examples_are_what_the_solver_undoes():
    solver, uniform = EulerEDM(), np.array([0.1, 0.9])
    with jax.enable_x64(True):
        clean, noise = jnp.asarray(NOISE[::-1]), jnp.asarray(NOISE)
        example = solver.example(clean, noise, jnp.asarray(uniform))
        sigmas = np.exp(4 * np.asarray(example.timestep))
        assert 0.002 < sigmas[0] < 1 < sigmas[1] < 700  # the larger, the noisier, as with all solvers
        s = sigmas.reshape(-1, 1, 1, 1, 1)
        found = example.latents / np.sqrt(s**2 + 1) - s / np.sqrt(s**2 + 1) * example.target
        np.testing.assert_allclose(found, clean, atol=1e-9)  # float64, less what s = 200 cancels
    assert np.asarray(example.latents).var() == pytest.approx(1, abs=0.2)


def half(latents, timestep, context=None):
    """A model."""
    return 0.5 * latents


def test_it_is_sampled_with_in_one_scan():
    found = sample(
        jax.tree_util.Partial(half), jnp.zeros((2, 1, 3)), noise=jnp.asarray(NOISE, jnp.float32), solver=EulerEDM(),
        steps=5, trajectory=True,
    )  # fmt: skip
    _, ours = run_ours(EulerEDM(), 5, half, NOISE)
    np.testing.assert_allclose(found.trajectory, [NOISE, *ours[:-1]], atol=1e-5)  # float32
    np.testing.assert_allclose(found.latents, ours[-1], atol=1e-5)


def test_settings_are_checked():
    assert get_solver("euler-edm", sigma_max=80.0) == EulerEDM(sigma_max=80.0)
    for options, message in (
        ({"sigma_min": 0.0}, "sigma_min is 0.0"), ({"sigma_max": float("inf")}, "sigma_max is inf"),
        ({"rho": True}, "rho is True"), ({"sigma_min": 2.0, "sigma_max": 2.0}, "from 2.0 down to 2.0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            EulerEDM(**options)
    with pytest.raises(UserError, match="steps is 0"):
        EulerEDM().schedule(0)
    with pytest.raises(UserError, match="'ddim' is for models of variance-preserving diffusion.*euler-edm"):
        related_solver(EulerEDM(), "ddim")
