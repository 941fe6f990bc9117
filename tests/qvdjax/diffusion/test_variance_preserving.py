"""DDIM and the stochastic DPM-Solver against diffusers' schedulers, driven by one model in float64."""

import itertools

import jax
import numpy as np
import pytest
import solver_runs
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from solver_runs import relative_error

from qvdjax.diffusion import DDIM, DPMSolverSDE, FlowMatchEuler, UniPCFlow, get_solver, related_solver
from qvdjax.diffusion.noise import check_seeds, step_keys, step_noise
from qvdjax.errors import UserError

RNG = np.random.default_rng(0)
SHAPE = (3, 4, 6, 5)  # frames, height, width, channels
SEEDS = np.array([3, 8], np.uint32)
NOISE = RNG.standard_normal((2, *SHAPE))
# A fixed random linear model: norm about 0.8 over the channels, and a constant.
MIX = RNG.standard_normal((SHAPE[-1], SHAPE[-1])) * 0.35
PUSH = RNG.standard_normal(SHAPE)

STEPS = (1, 2, 7, 10, 50)
SPACINGS = ("trailing", "leading", "linspace")
PREDICTIONS = ("v_prediction", "epsilon", "sample")


def model(latents, timestep):
    """The fixed random linear model, with a gain that depends on time; NumPy float64."""
    return (latents @ MIX + PUSH) * (0.7 + 0.3 * np.sin(0.004 * timestep))


def drawn(step):
    """The noise that our solver draws at a step, float64 as the latents are here."""
    return np.asarray(step_noise(step_keys(SEEDS), step, SHAPE), np.float64)


def run_ours(solver, steps, predict=model):
    return solver_runs.run_ours(solver, steps, predict, NOISE, SEEDS)


def run_diffusers_ddim(scheduler):
    return solver_runs.run_diffusers(scheduler, model, NOISE)


def run_diffusers_dpm(scheduler, monkeypatch):
    """The loop of diffusers' pipeline, with every draw of a step replaced by ours."""
    torch = pytest.importorskip("torch")
    latents, clean, previous, outputs = torch.from_numpy(NOISE), None, None, []
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
        lambda *_, **__: torch.from_numpy(drawn(len(outputs))),
    )
    for timestep in scheduler.timesteps:
        prediction = torch.from_numpy(model(latents.numpy(), float(timestep)))
        latents, clean = scheduler.step(prediction, clean, timestep, previous, latents, return_dict=False)
        previous = timestep
        outputs.append(latents.numpy())
    return np.stack(outputs)


def options(spacing, prediction, snr_shift_scale, zero_snr, to_one=True, offset=0):
    return {
        "timestep_spacing": spacing,
        "prediction_type": prediction,
        "snr_shift_scale": snr_shift_scale,
        "rescale_betas_zero_snr": zero_snr,
        "set_alpha_to_one": to_one,
        "steps_offset": offset,
    }


CASES = [
    options(spacing, prediction, scale, zero_snr)
    for spacing, prediction, (scale, zero_snr) in itertools.product(
        SPACINGS, PREDICTIONS, [(3.0, True), (1.0, True), (1.0, False)]
    )
    if not (prediction == "epsilon" and zero_snr and spacing != "leading")  # divides by a signal of zero
] + [options("leading", "v_prediction", 3.0, True, to_one=False, offset=1)]


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_equals_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    for case in CASES:
        scheduler = diffusers.CogVideoXDDIMScheduler(**case)
        scheduler.set_timesteps(steps)
        schedule, ours = run_ours(DDIM(**case), steps)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
        # Both compute in float64 from equal formulas. Near a = 1 the levels lose digits, 1 - a of 1e-3 some three
        # of sixteen; an epsilon of a nearly pure noise (a = 2e-3) is multiplied by up to 20. 1e-10 leaves room for
        # both, a wrong coefficient in the sixth digit does not fit.
        assert relative_error(ours, run_diffusers_ddim(scheduler)) <= 1e-10, case


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_equals_diffusers_fed_the_same_noise(steps, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    for case in CASES:
        scheduler = diffusers.CogVideoXDPMScheduler(**case)
        scheduler.set_timesteps(steps)
        schedule, ours = run_ours(DPMSolverSDE(**case), steps)
        np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
        # As above; a logarithm of 1 - a loses no more digits than 1 - a itself.
        assert relative_error(ours, run_diffusers_dpm(scheduler, monkeypatch)) <= 1e-10, case


@pytest.mark.parametrize("steps", [1, 10, 25])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_ddim_is_also_the_general_scheduler(steps, zero_snr):
    """diffusers' DDIMScheduler, with the settings of AnimateDiff and with zero terminal signal."""
    diffusers = pytest.importorskip("diffusers")
    prediction = "v_prediction" if zero_snr else "epsilon"
    case = {"beta_schedule": "linear", **options("leading", prediction, 1.0, zero_snr, offset=1)}
    solver = DDIM(**case)
    del case["snr_shift_scale"]
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, clip_sample=False, **case)
    scheduler.set_timesteps(steps)
    # diffusers multiplies a thousand float32 numbers, each off by half of 6e-8, that are rounded once more.
    np.testing.assert_allclose(solver.alphas_cumprod(), scheduler.alphas_cumprod, rtol=1e-4, atol=1e-7)
    # From the same levels in float64 it is the same method; only the form of the update differs.
    scheduler.alphas_cumprod = pytest.importorskip("torch").from_numpy(solver.alphas_cumprod())
    schedule, ours = run_ours(solver, steps)
    np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
    assert relative_error(ours, run_diffusers_ddim(scheduler)) <= 1e-10


def test_known_levels():
    """Values of the published schedulers, written down when they were studied, and their timesteps."""
    two, five = DDIM(rescale_betas_zero_snr=False), DDIM(snr_shift_scale=1.0, rescale_betas_zero_snr=False)
    np.testing.assert_allclose(two.alphas_cumprod()[0], 0.9974543, atol=5e-8)
    np.testing.assert_allclose(five.alphas_cumprod()[0], 0.99915, atol=5e-6)
    assert DDIM().alphas_cumprod()[-1] == 0
    assert (np.diff(DDIM().alphas_cumprod()) < 0).all()
    assert DDIM().alphas_cumprod()[0] == pytest.approx(two.alphas_cumprod()[0], rel=1e-12)  # the stretch keeps it
    np.testing.assert_array_equal(DDIM().timesteps(10), [999, 899, 799, 699, 599, 499, 399, 299, 199, 99])
    leading = DDIM(timestep_spacing="leading", steps_offset=1)
    np.testing.assert_array_equal(leading.timesteps(10), [901, 801, 701, 601, 501, 401, 301, 201, 101, 1])
    np.testing.assert_array_equal(DDIM(timestep_spacing="linspace").timesteps(4), [999, 666, 333, 0])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_those_of_diffusers_at_every_number_of_steps(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CogVideoXDDIMScheduler(timestep_spacing=spacing)
    longer = 0
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.numpy()
        longer += len(theirs) != steps
        np.testing.assert_array_equal(DDIM(timestep_spacing=spacing).timesteps(steps), theirs[:steps])
        assert (theirs[steps:] == -1).all()
    assert longer == (62 if spacing == "trailing" else 0)  # as the code says of diffusers


DIVISORS = [steps for steps in range(1, 101) if 1000 % steps == 0]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.sampled_from(DIVISORS),
    scale=st.floats(0.5, 5.0),
    zero_snr=st.booleans(),
    spacing=st.sampled_from(["trailing", "leading"]),
    kind=st.sampled_from([DDIM, DPMSolverSDE]),
)
def test_exact_for_a_single_video(steps, scale, zero_snr, spacing, kind):
    """A model that knows the only video there is says its exact v wherever one looks; every way ends there."""
    video = np.random.default_rng(2).standard_normal(SHAPE)
    solver = kind(snr_shift_scale=scale, rescale_betas_zero_snr=zero_snr, timestep_spacing=spacing)
    alphas = solver.alphas_cumprod()

    def oracle(latents, timestep):
        signal, rest = np.sqrt(alphas[int(timestep)]), np.sqrt(1 - alphas[int(timestep)])
        return (signal * latents - video) / rest

    _, outputs = run_ours(solver, steps, oracle)
    # float64; the last step keeps nothing but the clean latents of size 3, divided and multiplied by a 1 - a that
    # has lost three of sixteen digits.
    np.testing.assert_allclose(outputs[-1], np.broadcast_to(video, NOISE.shape), atol=1e-11)


@pytest.mark.parametrize("kind", [DDIM, DPMSolverSDE])
def test_step_keeps_the_shape_and_type_of_its_state(kind):
    """What `jax.lax.scan` asks of its carry; and every weight is finite, also where there is no signal."""
    solver = kind()
    for steps in (1, 2, 30, 1000):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(solver.schedule(steps)))
    state = solver.init(jax.numpy.asarray(NOISE, jax.numpy.float32), SEEDS)
    prediction = jax.numpy.ones(NOISE.shape, jax.numpy.bfloat16)
    after = solver.step(solver.schedule(4).row(2), state, prediction)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert after.latents.dtype == jax.numpy.float32
    assert [leaf.dtype for leaf in jax.tree.leaves(after)] == [leaf.dtype for leaf in jax.tree.leaves(state)]


def test_step_noise_belongs_to_the_seed_and_the_step_alone():
    together = np.asarray(step_noise(step_keys(np.array([3, 4, 5], np.uint32)), 2, SHAPE))
    alone = np.asarray(step_noise(step_keys(np.array([4], np.uint32)), 2, SHAPE))
    np.testing.assert_array_equal(alone[0], together[1])
    # Different for other steps and seeds: of 1,080 normal pairs, no correlation beyond 5 standard errors.
    others = [together[0], np.asarray(step_noise(step_keys(np.array([4], np.uint32)), 3, SHAPE))[0]]
    for other in others:
        assert abs(np.corrcoef(alone.ravel(), other.ravel())[0, 1]) < 5 / np.sqrt(alone.size)
    assert abs(alone.std() - 1) < 5 / np.sqrt(2 * alone.size)
    with jax.enable_x64(True):
        wide = step_noise(step_keys(np.array([4], np.uint32)), 2, SHAPE, np.float64)
        np.testing.assert_array_equal(wide, alone.astype(np.float64))


@pytest.mark.parametrize("spec", [P("data"), P(None, None, "data"), P("data", None, None, "other")])
def test_step_noise_is_the_same_on_one_device_and_on_eight(spec):
    if jax.device_count() < 8:
        pytest.skip(f"needs 8 devices, has {jax.device_count()}")
    axes = {"data": 4, "other": 2} if "other" in spec else {"data": 8}
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    seeds, shape = np.arange(8, dtype=np.uint32), (3, 8, 6, 5)

    def draw(seeds):
        return step_noise(step_keys(seeds), 1, shape)

    one = np.asarray(jax.jit(draw)(seeds))
    eight = jax.jit(draw, out_shardings=NamedSharding(mesh, spec))(seeds)
    assert len(eight.sharding.device_set) == 8
    # The bits are the same; how the inverse error function rounds may depend on how many are computed at once.
    np.testing.assert_allclose(eight, one, rtol=5e-7)


def test_another_solver_for_the_same_model_keeps_its_schedule():
    solver = DDIM(snr_shift_scale=1.0, timestep_spacing="leading", steps_offset=1)
    assert related_solver(solver) == solver
    expected = DPMSolverSDE(snr_shift_scale=1.0, timestep_spacing="trailing", steps_offset=1)
    assert related_solver(solver, "dpm-sde", timestep_spacing="trailing", steps_offset=None) == expected
    assert related_solver(UniPCFlow(3.0, order=3), "euler") == FlowMatchEuler(3.0)
    assert related_solver(UniPCFlow(3.0), None, order=1) == UniPCFlow(3.0, order=1)


def test_seeds_are_checked():
    np.testing.assert_array_equal(check_seeds([0, 2**32 - 1]), np.array([0, 2**32 - 1], np.uint32))
    with pytest.raises(UserError, match="no seeds"):
        DPMSolverSDE().init(NOISE)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: DDIM(beta_schedule="cosine"), "beta_schedule is 'cosine'.*scaled_linear, linear"),
        (lambda: DDIM(timestep_spacing=["trailing"]), "timestep_spacing is"),
        (lambda: DDIM(prediction_type="flow"), "prediction_type is 'flow'"),
        (lambda: DDIM(rescale_betas_zero_snr=1), "rescale_betas_zero_snr is 1.*True, False"),
        (lambda: DDIM(beta_start="0.1"), "betas run from '0.1'"),
        (lambda: DDIM(beta_start=0.5, beta_end=0.1), "betas run from 0.5 to 0.1"),
        (lambda: DDIM(snr_shift_scale=0), "snr_shift_scale is 0"),
        (lambda: DDIM(steps_offset=-1), "steps_offset is -1"),
        (lambda: DPMSolverSDE().schedule(1001), "steps is 1001.*at most 1000"),
        (lambda: DPMSolverSDE().schedule(0), "steps is 0"),
        (lambda: DDIM(timestep_spacing="leading", steps_offset=100).schedule(10), "beyond 999"),
        (lambda: DDIM(prediction_type="epsilon").schedule(5), "no signal, at timestep 999"),
        (lambda: get_solver("ddim", shift=3.0), "shift.*beta_start"),
        (lambda: related_solver(DDIM(), "euler"), "'euler' is for models of flow diffusion.*ddim, dpm-sde"),
        (lambda: related_solver(DDIM(), "heun"), "no solver called 'heun'"),
    ],
)
def test_bad_settings_are_named(make, named):
    with pytest.raises(UserError, match=named):
        make()
