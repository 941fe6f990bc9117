"""Ranges of timesteps: which sample has whose, found step by step, stored, and alike in both executions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import ConvThenLinear, OneBlock, growing_latents, wan, wan_inputs

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, layers_of
from qvdjax.numerics import Grid, Quantizer
from qvdjax.ptq import RangeSearch
from qvdjax.recipes import get


@pytest.fixture(scope="module")
def quantized():
    # Steps stand mixed in batches, as a calibration set has them.
    batches = [growing_latents([900.0, 500.0]), growing_latents([100.0]), growing_latents([900.0, 500.0], seed=1)]
    return qvdjax.quantize(OneBlock(ConvThenLinear()), get("tfmq-dm-w8a5", learn=False), batches, execution="integer")


def layer(model, name):
    return next(found for names, _, found in layers_of(model, QUANTIZED_LAYERS) if names == [f"block.{name}"])


def test_each_timestep_has_the_range_that_its_samples_ask_for(quantized):
    conv = layer(quantized, "conv")
    assert conv.scheme.activation.timesteps == (100.0, 500.0, 900.0)
    search, grid = RangeSearch("shrink"), Grid(5, symmetric=False)
    samples = {
        100.0: [growing_latents([100.0])["latents"]],
        900.0: [growing_latents([900.0, 500.0], seed)["latents"][:1] for seed in (0, 1)],
    }
    for timestep, latents in samples.items():
        low, high = (jnp.stack(ends) for ends in zip(*(search.edges(one, grid) for one in latents), strict=True))
        scale, zero_point = grid.from_range(low.min(), high.max())  # the widest of the calls
        row = conv.scheme.activation.timesteps.index(timestep)
        np.testing.assert_allclose(conv.input_scale[...][row, 0], scale, rtol=1e-6)
        np.testing.assert_array_equal(conv.input_zero_point[...][row, 0], zero_point)
    assert all("each of 3 timesteps has a range" in row["reason"] for row in qvdjax.describe(quantized))


def test_samples_of_a_batch_have_ranges_of_their_own(quantized):
    both = growing_latents([500.0, 100.0], seed=2)
    found = quantized(**both)
    for number in range(2):
        one = {name: array[number : number + 1] for name, array in both.items()}
        np.testing.assert_allclose(found[number], quantized(**one)[0], rtol=1e-5, atol=1e-5)  # the same integers


def test_a_timestep_between_takes_the_nearest(quantized):
    given = growing_latents([120.0], seed=3)
    np.testing.assert_array_equal(quantized(**given), quantized(**{**given, "timestep": jnp.array([100.0])}))
    assert bool((quantized(**given) != quantized(**{**given, "timestep": jnp.array([880.0])})).any())


def test_small_inputs_lose_less_than_with_one_range(quantized):
    one = qvdjax.quantize(
        OneBlock(ConvThenLinear()),
        get("mse-w8a5", activation_symmetric=False),
        [growing_latents([900.0, 500.0]), growing_latents([100.0])],
    )
    given = growing_latents([100.0])  # which both were calibrated with, so that nothing lies outside
    exact = OneBlock(ConvThenLinear())(**given)
    errors = [float(jnp.square(model(**given) - exact).mean()) for model in (quantized, one)]
    # Both calls' ranges on average are five times as wide, so a step's square is 25 times as large; a quarter leaves
    # room for where the search cuts.
    assert errors[0] < 0.25 * errors[1]


@pytest.mark.slow
def test_a_scanned_model_in_a_folder(tmp_path):
    others = r"blocks\..*(attn2.*|ffn.*)|condition_embedder\.time_proj"
    batches = [{**wan_inputs(batch=1, seed=s), "timestep": jnp.full((1,), 900.0 - 500 * s)} for s in (0, 1)]
    model = wan(num_layers=2)
    made = qvdjax.quantize(model, get("tfmq-dm-w8a8", skip=others, learn=False), batches, execution="simulate")
    models.save(made, tmp_path / "out")
    predict = jax.jit(lambda model, inputs: model(**inputs))
    inputs = wan_inputs(batch=2)
    found = predict(made, inputs)
    np.testing.assert_array_equal(predict(models.load(tmp_path / "out", execution="simulate"), inputs), found)
    integer = predict(models.load(tmp_path / "out", execution="integer"), inputs)
    error = lambda a, b: float(jnp.square(a - b).sum() / jnp.square(b).sum())  # noqa: E731
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert error(integer, found) < 1e-4
    # Eight bits hold about 1e-4 of a value's energy; other latents than the calibrated clip some.
    assert 1e-7 < error(found, predict(model, inputs)) < 2e-2


@pytest.mark.parametrize(
    "wrong", [{"dynamic": True}, {"timesteps": ()}, {"granularity": "tensor", "timesteps": (1.0,)}]
)
def test_what_makes_no_sense(wrong):
    with pytest.raises(ValueError, match="timesteps"):
        Quantizer(**{"bits": 8, "granularity": "step", **wrong})


def test_parts_and_timesteps_do_not_go_together():
    with pytest.raises(UserError, match="timesteps"):
        get("tfmq-dm-w8a8", split_inputs=True)
