"""Solvers against diffusers' schedulers, driven by the same velocity in float64."""

import jax
import numpy as np
import pytest
import solver_runs
from solver_runs import relative_error

from qvdjax.diffusion import FlowMatchEuler, UniPCFlow, get_solver
from qvdjax.diffusion.schedule import shifted
from qvdjax.errors import UserError

STEPS = (1, 2, 3, 10, 25)
SHIFTS = (1.0, 3.0, 5.0, 7.0, 12.0)
NOISE = np.random.default_rng(0).standard_normal((2, 3, 4, 6, 5))
TARGET = np.random.default_rng(1).standard_normal(NOISE.shape)


def velocity(latents, timestep):
    """A smooth field, nonlinear in the latents and in time, that pulls towards TARGET; NumPy float64."""
    return (latents - TARGET) * (0.7 + 0.3 * np.sin(0.004 * timestep)) + 0.5 * np.tanh(latents) * np.cos(
        0.003 * timestep
    )


def run_ours(solver, steps):
    return solver_runs.run_ours(solver, steps, velocity, NOISE)


def run_diffusers(scheduler):
    return solver_runs.run_diffusers(scheduler, velocity, NOISE)


def set_timesteps(scheduler, sigma_grid, steps):
    if sigma_grid == "diffusers":
        scheduler.set_timesteps(steps)
    else:  # Wan's own grid, through the argument diffusers has for it
        scheduler.set_timesteps(sigmas=np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1])


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
def test_euler_equals_diffusers(steps, shift):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, steps + 1)[:-1])
    schedule, ours = run_ours(FlowMatchEuler(shift), steps)
    # diffusers keeps sigmas in float32 (6e-8 relative, 1000 times that in a timestep) ...
    np.testing.assert_allclose(schedule.timesteps, scheduler.timesteps.numpy(), rtol=3e-7)
    # ... and rounds the latents to float32 at every step: some 6e-8 a step, adding like a random walk.
    assert relative_error(ours, run_diffusers(scheduler)) <= 1e-6


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("sigma_grid", ["original", "diffusers"])
def test_unipc_equals_diffusers(sigma_grid, shift, steps, order):
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction", solver_order=order
    )
    set_timesteps(scheduler, sigma_grid, steps)
    solver = UniPCFlow(shift, order=order, sigma_grid=sigma_grid)
    schedule, ours = run_ours(solver, steps)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    np.testing.assert_array_equal(np.append(schedule.sigmas, 0), scheduler.sigmas.numpy())
    # diffusers computes its weights from these levels in their own float32; the same levels in float64 make
    # it compute the method itself, so that only the order of float64 operations is left.
    scheduler.sigmas = scheduler.sigmas.to(torch.float64)
    assert relative_error(ours, run_diffusers(scheduler)) <= 1e-10


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("sigma_grid", ["original", "diffusers"])
def test_unipc_equals_diffusers_untouched(sigma_grid, steps):
    """The scheduler just as users run it, weights in float32."""
    diffusers = pytest.importorskip("diffusers")
    for shift in SHIFTS:
        scheduler = diffusers.UniPCMultistepScheduler(
            use_flow_sigmas=True, flow_shift=shift, prediction_type="flow_prediction"
        )
        set_timesteps(scheduler, sigma_grid, steps)
        _, ours = run_ours(UniPCFlow(shift, sigma_grid=sigma_grid), steps)
        # Float32 weights, rounded a dozen times each: about 1e-7, as measured at most.
        assert relative_error(ours, run_diffusers(scheduler)) <= 1e-6


def test_known_noise_levels():
    """Values of the upstream implementations at 10 steps, written down when they were studied."""
    wan = UniPCFlow(3.0).schedule(10)
    np.testing.assert_allclose(wan.sigmas[[0, 1, -1]], [0.99967, 0.96394, 0.24979], atol=5e-6)
    np.testing.assert_array_equal(wan.timesteps[[0, 1, -1]], [999, 963, 249])
    assert (wan.next_sigmas[:-1] == wan.sigmas[1:]).all()
    assert wan.next_sigmas[-1] == 0
    diffusers = UniPCFlow(3.0, sigma_grid="diffusers").schedule(10)
    np.testing.assert_allclose(diffusers.sigmas[[0, 1, -1]], [0.999999, 0.96432, 0.25187], atol=5e-6)
    hunyuan = FlowMatchEuler(7.0).schedule(10)
    expected = [1000, 984.38, 965.52, 942.31, 913.04, 875, 823.53, 750, 636.36, 437.5]
    np.testing.assert_allclose(hunyuan.timesteps, expected, atol=5e-3)  # written down to two decimals


def test_shift_moves_levels_up_and_keeps_the_ends():
    grid = np.linspace(0, 1, 11)
    moved = shifted(grid, 4.0)
    assert moved[0] == 0
    assert moved[-1] == 1
    assert (moved[1:-1] > grid[1:-1]).all()
    np.testing.assert_array_equal(shifted(grid, 1.0), grid)


@pytest.mark.parametrize("solver", [FlowMatchEuler(3.0), UniPCFlow(3.0), UniPCFlow(8.0, sigma_grid="diffusers")])
@pytest.mark.parametrize("steps", [1, 2, 50])
def test_exact_for_a_straight_flow(solver, steps):
    """If the velocity is noise - video wherever one looks, any number of steps ends at the video."""
    video = np.random.default_rng(2).standard_normal(NOISE.shape).astype(np.float32)
    noise = NOISE.astype(np.float32)
    schedule = solver.schedule(steps)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(schedule))
    # The first level of UniPC's grids is below 1: start where the straight line is at that level.
    start = schedule.sigmas[0] * noise + (1 - schedule.sigmas[0]) * video
    state = solver.init(jax.numpy.asarray(start, jax.numpy.float32))
    for index in range(steps):
        state = solver.step(schedule.row(index), state, noise - video)
        assert np.isfinite(state.latents).all()
    # Float32 sums of a few terms of size 4, rounded at each of up to 50 steps: 50 * 4 * 6e-8 at worst.
    np.testing.assert_allclose(state.latents, video, atol=1.2e-5)


@pytest.mark.parametrize("solver", [FlowMatchEuler(3.0), UniPCFlow(3.0, order=3)])
def test_step_keeps_the_shape_and_type_of_its_state(solver):
    """What `jax.lax.scan` asks of its carry."""
    state = solver.init(jax.numpy.asarray(NOISE, jax.numpy.float32))
    velocity_bf16 = jax.numpy.ones(NOISE.shape, jax.numpy.bfloat16)
    after = solver.step(solver.schedule(4).row(2), state, velocity_bf16)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.dtype == jax.numpy.float32 for leaf in jax.tree.leaves(after))


def test_get_solver():
    assert get_solver("euler", shift=7.0) == FlowMatchEuler(7.0)
    assert get_solver("unipc", shift=None, sigma_grid="diffusers") == UniPCFlow(sigma_grid="diffusers")


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: get_solver("heun"), "heun.*unipc, euler, ddim, dpm-sde"),
        (lambda: get_solver("euler", order=2), "order.*shift"),
        (lambda: UniPCFlow(sigma_grid="karras"), "karras.*original, diffusers"),
        (lambda: UniPCFlow(order=4), "order is 4"),
        (lambda: UniPCFlow(shift=0), "shift is 0"),
        (lambda: FlowMatchEuler(float("nan")), "shift is nan"),
        (lambda: UniPCFlow(1e9).schedule(4), "shift 1000000000.0"),
        (lambda: FlowMatchEuler().schedule(0), "steps is 0"),
        (lambda: UniPCFlow().schedule(2.5), "steps is 2.5"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
