"""Guidance, noise and the sampling loop, on a small model with the call of a real one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.diffusion import (
    DDIM,
    DPMSolverSDE,
    EulerEDM,
    FlowMatchEuler,
    Precise,
    UniPCFlow,
    compile_sampler,
    guidance_scales,
    guided,
    guided_steps,
    initial_noise,
    sample,
)
from qvdjax.errors import UserError

SHAPE = (3, 4, 6, 5)  # frames, height, width, channels
SOLVERS = [FlowMatchEuler(3.0), UniPCFlow(3.0), DDIM(), DPMSolverSDE()]


class Field(nnx.Module):
    """A velocity that depends on everything a model is given; `calls` counts how often it is traced."""

    calls = 0

    def __init__(self, key, dtype=jnp.float32):
        mix, text = jax.random.split(key)
        self.mix = nnx.Param(jax.random.normal(mix, (SHAPE[-1], SHAPE[-1]), dtype) / 2)
        self.text = nnx.Param(jax.random.normal(text, (7, SHAPE[-1]), dtype) / 2)

    def __call__(self, latents, timestep, context, *, brightness=None):
        Field.calls += 1
        assert timestep.shape == latents.shape[:1]
        assert timestep.dtype == jnp.float32
        latents = latents.astype(self.mix.dtype)
        push = jnp.einsum("btd,dc->bc", context, self.text[...]) * jnp.cos(timestep / 300)[:, None]
        push = push if brightness is None else push + brightness[:, None]
        velocity = jnp.tanh(latents @ self.mix[...] + push[:, None, None, None, :])  # b f h w c
        return velocity.astype(self.mix.dtype)


@pytest.fixture
def case():
    context = jax.random.normal(jax.random.key(1), (8, 4, 7))
    return {
        "model": Field(jax.random.key(0)),
        "context": context,
        "negative_context": jnp.zeros_like(context),
        "noise": initial_noise(range(8), SHAPE),
        "seeds": range(8),
    }


def by_hand(
    model, context, negative_context, noise, seeds, solver, steps, guidance_scale, dynamic_guidance=None,
    guidance_until=0.0,
):  # fmt: skip
    """The loop written out, in NumPy where it matters: the reference for `sample`."""
    schedule, state, seen = solver.schedule(steps), solver.init(noise, np.array(seeds, np.uint32)), []
    scales = np.float32(guidance_scales(guidance_scale, schedule.timesteps, dynamic_guidance))
    for index in range(steps):
        timestep = jnp.full((noise.shape[0],), schedule.timesteps[index], jnp.float32)
        conditional = np.asarray(model(state.latents, timestep, context))
        unconditional = np.asarray(model(state.latents, timestep, negative_context))
        seen.append(state.latents)
        velocity = unconditional + scales[index] * (conditional - unconditional)
        if timestep[0] < guidance_until:
            velocity = conditional
        state = solver.step(schedule.row(index), state, velocity)
    return state.latents, np.stack(seen)


@pytest.mark.parametrize("solver", SOLVERS)
def test_scan_and_step_loop_make_the_numbers_of_a_written_out_loop(case, solver):
    arguments = {**case, "solver": solver, "steps": 6, "guidance_scale": 4.0}
    want, seen = by_hand(**arguments)
    scanned = sample(**arguments, trajectory=True)
    # The same float32 operations fused differently: 6 steps, each rounding values of size 4 a dozen times,
    # guidance of 4 multiplies what came before by up to 8 through a field of slope about 1.
    np.testing.assert_allclose(scanned.latents, want, atol=2e-5)
    np.testing.assert_allclose(scanned.trajectory, seen, atol=2e-5)
    np.testing.assert_array_equal(scanned.trajectory[0], case["noise"])
    assert scanned.trajectory.shape == (6, 8, *SHAPE)

    steps = []
    looped = sample(**arguments, trajectory=True, on_step=lambda *call: steps.append(call))
    assert [step for step, _, _ in steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_array_equal(steps[-1][1], looped.latents)
    np.testing.assert_allclose(looped.latents, scanned.latents, atol=2e-5)  # as above
    np.testing.assert_allclose(looped.trajectory, scanned.trajectory, atol=2e-5)


@pytest.mark.parametrize("step_loop", [False, True])
def test_what_is_compiled_ahead_is_not_compiled_again(case, step_loop):
    arguments = {**case, "solver": UniPCFlow(2.75), "steps": 4, "guidance_scale": 4.0}
    sample(**{**arguments, "steps": 5}, on_step=(lambda *_: None) if step_loop else None)  # small operations
    compilation = compile_sampler(**arguments, step_loop=step_loop)
    assert compilation.seconds > 0
    compiled = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        traced = Field.calls
        sample(**arguments, on_step=(lambda *_: None) if step_loop else None)
        assert Field.calls == traced
        assert not compiled
        sample(**{**arguments, "steps": 6 + step_loop})
        assert compiled  # the listener does hear compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_a_compiled_step_serves_runs_of_any_length(case):
    arguments = {**case, "solver": UniPCFlow(2.625), "guidance_scale": 4.0, "on_step": lambda *_: None}
    sample(**arguments, steps=4, guidance_until=600.0)
    traced = Field.calls
    sample(**arguments, steps=6, guidance_until=300.0)
    sample(**arguments, steps=3)
    assert Field.calls == traced


def test_models_of_one_structure_share_a_compilation(case):
    arguments = {**case, "solver": FlowMatchEuler(2.5), "steps": 3, "guidance_scale": 2.0}
    first = sample(**arguments).latents
    traced = Field.calls
    other = sample(**{**arguments, "model": Field(jax.random.key(9)), "guidance_scale": 3.0}).latents
    assert Field.calls == traced
    assert not np.allclose(first, other)


def test_latents_stay_float32_under_a_bfloat16_model(case):
    result = sample(
        **{**case, "model": Field(jax.random.key(0), jnp.bfloat16)},
        solver=UniPCFlow(3.0),
        steps=5,
        guidance_scale=3.0,
        trajectory=True,
    )
    assert result.latents.dtype == result.trajectory.dtype == jnp.float32
    # Latents that had been rounded to bfloat16 on the way would all be bfloat16 numbers.
    latents = result.trajectory[-1]
    assert (latents != latents.astype(jnp.bfloat16).astype(jnp.float32)).mean() > 0.9


@pytest.mark.parametrize("doubled_batch", [False, True])
def test_guidance(case, doubled_batch):
    model, context, negative, noise, _ = case.values()
    timestep, brightness = jnp.full((8,), 500.0), jnp.arange(8) / 8
    conditional = model(noise, timestep, context, brightness=brightness)
    unconditional = model(noise, timestep, negative, brightness=brightness)
    predict = guided(model, 5.0, doubled_batch=doubled_batch)
    got = predict(noise, timestep, context, negative, brightness=brightness)
    # One product of 16 rows may be summed in another order than two of 8: a few roundings of values of
    # size 1, times the scale of 5.
    np.testing.assert_allclose(got, unconditional + 5.0 * (conditional - unconditional), atol=5e-6)
    unguided = guided(model, 1.0, doubled_batch=doubled_batch)
    np.testing.assert_array_equal(unguided(noise, timestep, context, brightness=brightness), conditional)


def test_guidance_is_combined_in_float32(case):
    model = Field(jax.random.key(0), jnp.bfloat16)
    noise, timestep = case["noise"], jnp.full((8,), 500.0)
    velocity = guided(model, 5.0)(noise, timestep, case["context"], case["negative_context"])
    conditional = np.asarray(model(noise, timestep, case["context"]), np.float32)
    unconditional = np.asarray(model(noise, timestep, case["negative_context"]), np.float32)
    assert velocity.dtype == jnp.float32
    # Both are exact in float32 but for one rounding of the product and one of the sum, at size 10.
    np.testing.assert_allclose(velocity, unconditional + 5 * (conditional - unconditional), atol=2e-6)


def test_without_guidance_the_negative_pass_is_left_out(case):
    case = {**case, "negative_context": None}
    before = Field.calls
    sample(**case, solver=FlowMatchEuler(1.7), steps=2, guidance_scale=1.0)
    assert Field.calls == before + 1  # one trace of the scan's body, one call in it


def test_dynamic_guidance_scales():
    timesteps = DDIM().timesteps(50)
    assert (guidance_scales(6.0, timesteps) == 6.0).all()
    published = dict(zip(timesteps, guidance_scales(6.0, timesteps, "timestep")))
    # Values of diffusers' formula, written down to two decimals when it was studied.
    expected = {999: 2.29, 899: 4.27, 499: 1.52, 99: 6.86, 19: 1.12}
    assert {t: round(published[t], 2) for t in expected} == expected
    rising = guidance_scales(6.0, timesteps, "step")
    assert rising[0] == 1
    assert (np.diff(rising) >= 0).all()
    assert 6.8 < rising[-1] < 7  # 1 + 6 * (1 - cos(pi * 0.98^5)) / 2 = 6.87


@pytest.mark.parametrize("kind", ["timestep", "step"])
def test_dynamic_guidance_reaches_every_step(case, kind):
    arguments = {**case, "solver": DDIM(), "steps": 4, "guidance_scale": 4.0, "dynamic_guidance": kind}
    want, _ = by_hand(**arguments)
    # As for the written-out loop, at guidance of up to 5.
    np.testing.assert_allclose(sample(**arguments).latents, want, atol=3e-5)
    assert not np.allclose(want, by_hand(**{**arguments, "dynamic_guidance": None})[0], atol=1e-2)


@pytest.mark.parametrize("solver", SOLVERS)
def test_steps_below_a_timestep_are_not_guided(case, solver):
    arguments = {**case, "solver": solver, "steps": 6, "guidance_scale": 4.0, "guidance_until": 400.0}
    want, seen = by_hand(**arguments)
    before = Field.calls
    got = sample(**arguments, trajectory=True)
    assert Field.calls == before + 3  # two in the body of the guided steps, one in that of the others
    # As for the written-out loop.
    np.testing.assert_allclose(got.latents, want, atol=2e-5)
    np.testing.assert_allclose(got.trajectory, seen, atol=2e-5)
    assert not np.allclose(want, by_hand(**{**arguments, "guidance_until": 0.0})[0], atol=1e-2)
    compile_sampler(**arguments, step_loop=True)
    traced = Field.calls
    looped = sample(**arguments, on_step=lambda *_: None)
    assert Field.calls == traced
    np.testing.assert_allclose(looped.latents, want, atol=2e-5)


def test_guided_steps_are_counted_from_the_first():
    # DSAQuant's own figure: the last nine of fifty steps at a shift of 3.
    timesteps = FlowMatchEuler(3.0).schedule(50).timesteps
    assert guided_steps(5.0, timesteps, 400.0) == 41
    assert guided_steps(5.0, timesteps) == 50
    assert guided_steps(1.0, timesteps) == 0
    assert guided_steps(5.0, DDIM().timesteps(50), 1000.0) == 0


def test_step_noise_is_the_videos_own(case):
    """The same initial noise with other seeds is another video; each follows its own seed, not its place."""
    arguments = {**case, "solver": DPMSolverSDE(), "steps": 3, "guidance_scale": 1.0}
    first = sample(**arguments).latents
    other = sample(**{**arguments, "seeds": [9, *range(1, 8)]}).latents
    np.testing.assert_array_equal(first[1:], other[1:])
    assert not np.allclose(first[0], other[0], atol=0.1)


def test_noise_belongs_to_the_seed_alone():
    together = initial_noise([3, 4, 5], SHAPE)
    np.testing.assert_array_equal(initial_noise([4], SHAPE)[0], together[1])
    assert not np.allclose(together[0], together[1])
    assert together.dtype == jnp.float32
    # 1,080 standard normal draws: mean and deviation within 5 standard errors (0.03 and 0.022).
    assert abs(float(together.mean())) < 0.15
    assert abs(float(together.std()) - 1) < 0.11
    rounded = initial_noise([4], SHAPE, jnp.bfloat16)[0]
    np.testing.assert_array_equal(rounded, together[1].astype(jnp.bfloat16))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(initial_noise([4], SHAPE)[0], together[1])
        np.testing.assert_array_equal(initial_noise([4], SHAPE, jnp.float64)[0], together[1].astype(jnp.float64))
    # The first draws of seed 4, written down: another generator would mean other videos for old seeds.
    # One unit in the last place: backends may round the inverse error function differently.
    np.testing.assert_allclose(together[1].reshape(-1)[:3], [1.1777242, 0.7384810, -1.0801565], rtol=2e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_same_video_on_one_device_and_on_eight(case, solver):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, P("data"))
    settings = {"solver": solver, "steps": 8, "guidance_scale": 4.0}
    one = sample(**case, **settings).latents
    model = jax.device_put(case["model"], NamedSharding(mesh, P()))
    arrays = {name: jax.device_put(array, spread) for name, array in case.items() if name not in ("model", "seeds")}
    eight = sample(model, **arrays, seeds=case["seeds"], **settings).latents
    assert len(eight.sharding.device_set) == 8
    # No sum crosses devices here; what differs is how a product of one row is compiled from one of eight:
    # last bits of float32, grown over 8 steps as in the test of the written-out loop.
    np.testing.assert_allclose(eight, one, atol=3e-5)
    # And a video on its own is the video it is in a batch.
    alone = {name: array[2:3] for name, array in case.items() if name != "model"}
    np.testing.assert_allclose(sample(case["model"], **alone, **settings).latents[0], one[2], atol=3e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"negative_context": None}, "guidance scale 4.0 needs a negative context"),
        ({"context": jnp.zeros((7, 4, 7))}, r"context has shape \(7, 4, 7\)"),
        ({"brightness": jnp.zeros((3,))}, r"brightness has shape \(3,\)"),
        ({"seeds": [1, 2]}, r"seeds has shape \(2,\)"),
        ({"solver": DPMSolverSDE(), "seeds": None}, "given no seeds"),
        ({"dynamic_guidance": "cosine"}, "kind 'cosine'.*timestep, step"),
        ({"guidance_until": -1.0}, "guidance until timestep -1"),
        ({"guidance_until": float("nan")}, "guidance until timestep nan"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance_scale": float("inf")}, "guidance scale is inf"),
    ],
)
def test_bad_arguments_are_named(case, change, named):
    arguments = {**case, "solver": FlowMatchEuler(3.0), "steps": 2, "guidance_scale": 4.0, **change}
    with pytest.raises(UserError, match=named):
        sample(**arguments)


@pytest.mark.parametrize("seeds", [[-1], [2**32], []])
def test_unusable_seeds(seeds):
    with pytest.raises(UserError, match="seed"):
        initial_noise(seeds, SHAPE)


def test_solvers_are_static_arguments():
    assert hash(UniPCFlow(3.0)) == hash(dataclasses.replace(UniPCFlow(5.0), shift=3.0))


def test_precise_steps_are_another_models(case):
    other = Field(jax.random.key(5))

    def run(model, precise=None, **more):
        shared = {**case, "solver": UniPCFlow(3.0), "steps": 5, "guidance_scale": 3.0, **more}
        return sample(**{**shared, "model": model}, precise=precise).latents

    plain = run(case["model"])
    # No step of the other, and all of them: the scan is cut elsewhere, the arithmetic is the same.
    np.testing.assert_allclose(run(case["model"], Precise(other)), plain, atol=1e-6)
    np.testing.assert_allclose(run(case["model"], Precise(other, first=2, last=3)), run(other), atol=1e-6)
    mixed = run(case["model"], Precise(other, first=1, last=2))
    assert np.abs(mixed - plain).max() > 1e-2
    stepped = run(case["model"], Precise(other, first=1, last=2), on_step=lambda *_: None)
    np.testing.assert_allclose(stepped, mixed, atol=1e-5)
    halves = run(case["model"], Precise(other, first=1, last=2), guidance_until=700.0)
    assert np.abs(halves - mixed).max() > 1e-2  # both kinds of stretches at once


def test_precise_steps_meet_the_state_that_the_others_left(case):
    other = Field(jax.random.key(5))
    shared = {**case, "solver": FlowMatchEuler(3.0), "steps": 4, "guidance_scale": 2.0, "trajectory": True}
    mixed = sample(**shared, precise=Precise(other, last=1))
    plain = sample(**shared)
    # Up to the last step both went the same way; that one is the other model's from there.
    np.testing.assert_allclose(mixed.trajectory, plain.trajectory, atol=1e-6)
    assert np.abs(mixed.latents - plain.latents).max() > 1e-3


@pytest.mark.parametrize("step_loop", [False, True])
def test_compiling_ahead_knows_precise_steps(case, step_loop):
    options = {**case, "solver": FlowMatchEuler(3.0), "steps": 3, "precise": Precise(Field(jax.random.key(5)), first=1)}
    compile_sampler(**options, step_loop=step_loop)
    before = Field.calls
    sample(**options, on_step=(lambda *_: None) if step_loop else None)
    assert Field.calls == before


def test_negative_numbers_of_precise_steps_are_refused():
    with pytest.raises(UserError, match="precise last steps"):
        Precise(None, last=-1)


@pytest.mark.parametrize("solver", [*SOLVERS, EulerEDM()], ids=lambda solver: type(solver).__name__)
def test_the_last_prediction_says_what_the_latents_become(case, solver):
    ends = []
    result = sample(**case, solver=solver, steps=3, guidance_scale=2.0, on_step=lambda *call: ends.append(call[2]))
    assert len(ends) == 3
    # The last step of each leads to clean latents; float32 sums of three terms of size 4.
    np.testing.assert_allclose(ends[-1], result.latents, atol=2e-5)
    assert np.abs(ends[0] - ends[-1]).max() > 0.1


@pytest.mark.parametrize("solver", [FlowMatchEuler(3.0), UniPCFlow(3.0, sigma_grid="diffusers")])
def test_on_a_straight_path_every_prediction_leads_to_its_end(case, solver):
    noise, ends = case["noise"], []
    clean = jnp.ones_like(noise)
    straight = jax.tree_util.Partial(lambda velocity, latents, timestep, context: velocity, noise - clean)
    sample(straight, case["context"], noise=noise, solver=solver, steps=4, on_step=lambda *call: ends.append(call[2]))
    for end in ends:
        # UniPC begins a little beside the noise level 1 and has the noise as it is: off by that much of it.
        np.testing.assert_allclose(end, clean, atol=1e-4)
