"""What models are trained on agrees with how the solvers sample them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.diffusion import DDIM, DPMSolverSDE, FlowMatchEuler, UniPCFlow

COUNT = 400
UNIFORM = (np.arange(COUNT) + 0.5) / COUNT
CLEAN, NOISE = np.random.default_rng(0).standard_normal((2, COUNT, 1, 2, 1, 3))


def example(solver, dtype=np.float64):
    with jax.enable_x64(dtype == np.float64):
        made = jax.jit(solver.example)(*(jnp.asarray(array, dtype) for array in (CLEAN, NOISE, UNIFORM)))
        assert made.latents.dtype == made.target.dtype == dtype
        return jax.tree.map(np.asarray, made)


@pytest.mark.parametrize("solver", [FlowMatchEuler(1.0), FlowMatchEuler(3.0), UniPCFlow(3.0)])
def test_flow(solver):
    made = example(solver)
    s = solver.shift * UNIFORM / (1 + (solver.shift - 1) * UNIFORM)
    # The same few operations in float64.
    np.testing.assert_allclose(made.timestep, 1000 * s, rtol=1e-12)
    level = s[:, None, None, None, None]
    np.testing.assert_allclose(made.latents, (1 - level) * CLEAN + level * NOISE, atol=1e-12)
    np.testing.assert_allclose(made.latents - level * made.target, CLEAN, atol=1e-12)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon", "sample"])
@pytest.mark.parametrize("kind", [DDIM, DPMSolverSDE])
def test_a_variance_preserving_target_leads_the_solver_to_the_clean_latents(kind, prediction_type):
    solver = kind(prediction_type=prediction_type, rescale_betas_zero_snr=False)
    made = example(solver)
    rows = made.timestep.astype(int)
    np.testing.assert_array_equal(rows, np.floor(1000 * UNIFORM))  # evenly over all timesteps
    assert made.timestep.dtype == np.float32
    signal, rest = (
        np.sqrt(a)[:, None, None, None, None]
        for a in (solver.alphas_cumprod()[rows], 1 - solver.alphas_cumprod()[rows])
    )
    np.testing.assert_allclose(made.latents, signal * CLEAN + rest * NOISE, atol=1e-12)
    weights = solver.clean_weights(solver.alphas_cumprod()[rows])[:, :, None, None, None, None]
    # An epsilon is divided by a signal of at least 0.04: float64's 1e-16 times a hundred.
    np.testing.assert_allclose(weights[:, 0] * made.latents + weights[:, 1] * made.target, CLEAN, atol=1e-12)


def test_float32_and_the_ends():
    solver = DDIM()
    ends = jax.jit(solver.example)(
        *(jnp.asarray(array[:2], jnp.float32) for array in (CLEAN, NOISE)), jnp.array([0.0, 1.0], jnp.float32)
    )
    np.testing.assert_array_equal(ends.timestep, [0, 999])
    np.testing.assert_array_equal(ends.latents[1], np.float32(NOISE[1]))  # nothing is left of the signal
    exact, rounded = example(solver), example(solver, np.float32)
    # Three roundings of numbers of size 4.
    np.testing.assert_allclose(rounded.latents, exact.latents, atol=2e-6)
    np.testing.assert_allclose(rounded.target, exact.target, atol=2e-6)


def test_agrees_with_diffusers():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(rescale_betas_zero_snr=True)
    made = example(DDIM())
    clean, noise, timestep = (
        torch.from_numpy(CLEAN),
        torch.from_numpy(NOISE),
        torch.from_numpy(made.timestep.astype(int)),
    )
    # Both float64, from formulas that are the same.
    np.testing.assert_allclose(made.latents, scheduler.add_noise(clean, noise, timestep), atol=1e-12)
    np.testing.assert_allclose(made.target, scheduler.get_velocity(clean, noise, timestep), atol=1e-12)
