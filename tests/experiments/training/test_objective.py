"""The loss: nothing for the perfect model, noise levels as a sampler visits them, captions dropped at the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.objective import Objective
from qvdjax.diffusion import DDIM


@pytest.fixture(scope="module")
def examples():
    keys = jax.random.split(jax.random.key(1))
    return {
        "latents": jax.random.normal(keys[0], (4, 3, 4, 4, 5)),
        "context": jax.random.normal(keys[1], (4, 6, 7)),
    }


def test_the_perfect_model_loses_nothing(examples):
    captured = {}

    def oracle(noisy, timestep, context):
        level = (timestep / 1000)[:, None, None, None, None]
        captured["timestep"] = timestep
        return (noisy - examples["latents"]) / level  # x_s - x = s (e - x)

    loss = Objective()(oracle, examples, jax.random.key(0))
    # Divided by levels down to about 0.1: rounding of 1e-7 / 0.1, squared.
    assert loss < 1e-10
    assert ((captured["timestep"] > 0) & (captured["timestep"] < 1000)).all()


def test_levels_are_those_of_a_shifted_sampler():
    batch = {"latents": jnp.zeros((1000, 1, 1, 1, 1)), "context": jnp.zeros((1000, 1, 1))}
    levels = np.sort(np.asarray(Objective().corrupt(batch, jax.random.key(0))["timestep"])) / 1000
    u = (np.arange(1000) + 0.5) / 1000
    np.testing.assert_allclose(levels, 3 * u / (1 + 2 * u), atol=2e-3)  # one in each thousandth, slope up to 3


def test_dropped_captions_reach_the_model_as_zeros(examples):
    seen = []

    def model(noisy, timestep, context):
        seen.append(np.asarray(context))
        return noisy

    Objective(drop_caption=1.0)(model, examples, jax.random.key(0))
    Objective(drop_caption=0.0)(model, examples, jax.random.key(0))
    assert not seen[0].any()
    assert (seen[1] == examples["context"]).all()
    many = {name: jnp.repeat(value, 250, axis=0) for name, value in examples.items() if name == "context"}
    many["latents"] = jnp.zeros((1000, 1, 1, 1, 1))
    Objective(drop_caption=0.1)(model, many, jax.random.key(0))
    dropped = 1 - seen[2].any(axis=(1, 2)).mean()
    assert 0.06 < dropped < 0.14  # four deviations of a thousand coins


def test_the_teacher_fades_into_the_data():
    """DSAQuant's weights at s = 0, 0.5 and 1 with a = 5, by hand: 0, (e^2.5 - 1) / (e^5 - 1) = 0.0759, 1."""
    objective = Objective(data=1.0, teacher=1.0, fading=5.0)
    np.testing.assert_allclose(objective.teacher_share(jnp.array([0.0, 0.5, 1.0])), [0, 0.07586, 1], atol=1e-4)
    ones = jnp.ones((3, 1, 1, 1, 2))
    timestep, context = jnp.array([0.0, 500.0, 1000.0]), jnp.ones((3, 1, 1))
    corrupted = {"latents": ones, "target": 3 * ones, "timestep": timestep, "context": context}
    loss = objective.loss(lambda *inputs: ones, corrupted, lambda *inputs: 2 * ones)
    share = np.array([0, 0.0758582, 1])
    # Distances 4 to the data and 1 to the teacher, at each level by its share; float32.
    assert float(loss) == pytest.approx(np.mean(4 * (1 - share) + share), rel=1e-5)


def test_a_loss_of_the_data_alone_asks_no_teacher(examples):
    def teacher(*inputs):
        raise AssertionError("the teacher was asked")

    assert np.isfinite(Objective()(lambda *inputs: inputs[0], examples, jax.random.key(0), teacher))


def test_motion_weighs_what_frames_do_not_share():
    """Two frames in each of two latents, errors 1, 2, 3 and 6: their mean is 3, beside it stand -2, -1, 0 and 3."""
    latents = jnp.array([[1.0, 2.0], [3.0, 6.0]]).reshape(1, 2, 1, 1, 2)  # f (t c) -> b f h w (t c)
    corrupted = {name: jnp.zeros((1, 1, 1)) for name in ("timestep", "context")}
    corrupted |= {"latents": latents, "target": jnp.zeros_like(latents)}
    loss = Objective(motion=10.0, frame_factor=2).loss(lambda *inputs: inputs[0], corrupted)
    assert float(loss) == pytest.approx(9 + 10 * (4 + 1 + 0 + 9) / 4, rel=1e-6)
    same = Objective(frame_factor=2).loss(lambda *inputs: inputs[0], corrupted)
    assert float(same) == pytest.approx((1 + 4 + 9 + 36) / 4, rel=1e-6)


def test_errors_weigh_as_those_of_v_up_to_a_limit():
    solver = DDIM(prediction_type="sample")
    ones, timestep = jnp.ones((3, 1, 1, 1, 2)), jnp.array([0.0, 300.0, 999.0])
    corrupted = {"latents": ones, "target": 3 * ones, "timestep": timestep, "context": jnp.ones((3, 1, 1))}
    loss = Objective(solver=solver, most=5.0).loss(lambda *inputs: ones, corrupted)
    alphas = solver.alphas_cumprod()
    middle = 1 / (1 - alphas[300])
    assert 1 < middle < 5 < 1 / (1 - alphas[0])  # one of each kind, and no signal at the last
    assert float(loss) == pytest.approx(4 * (5 + middle + 1) / 3, rel=1e-5)
    with pytest.raises(ValueError, match="where clean latents are predicted"):
        Objective(solver=DDIM(), most=5.0)


def test_variance_preserving_models_see_their_own_noise(examples):
    """CogVideoX's: sqrt(a) x + sqrt(1 - a) e, and v = sqrt(a) e - sqrt(1 - a) x at whole timesteps."""
    corrupted = Objective(solver=DDIM()).corrupt(examples, jax.random.key(3))
    timestep = np.asarray(corrupted["timestep"])
    assert (timestep == np.floor(timestep)).all()
    noise = jax.random.normal(jax.random.split(jax.random.key(3), 3)[1], examples["latents"].shape)
    # (noisy, v) is a rotation of (x, e): lengths are kept, up to float32 rounding of the two roots.
    kept = jnp.square(corrupted["latents"]) + jnp.square(corrupted["target"])
    np.testing.assert_allclose(kept, jnp.square(examples["latents"]) + jnp.square(noise), rtol=1e-4, atol=1e-5)
