"""The loss: nothing for the perfect model, noise levels as a sampler visits them, captions dropped at the rate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.training.objective import Objective


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
    levels = np.sort(np.asarray(Objective(shift=3.0).levels(jax.random.key(0), 1000)))
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
