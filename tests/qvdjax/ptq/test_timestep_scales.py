"""Steps as a learned function of the timestep: first values, what they cost, what networks find, and the folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import OneBlock, growing_latents

import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, Linear, layers_of
from qvdjax.numerics import Grid
from qvdjax.ptq.timestep_scales import Start, TimestepScales, learned_steps, timestep_ranges
from qvdjax.recipes import decide, get

QUICK = {"iterations": 400, "rate": 5e-3, "dropout": 0.0}


def test_first_steps_are_the_published_ones():
    # Negative inputs: 3 deviations at the largest of 127 codes.
    assert Start.of(0.5, 2.0, -9.0, 8) == (pytest.approx(6.5 / 127), None)
    # Nowhere negative: 16 deviations at code 255.
    assert Start.of(0.5, 0.25, 0.0, 8) == (pytest.approx(4.5 / 255), 0.0)
    # Behind a SiLU: counted from its minimum.
    assert Start.of(0.5, 0.25, -0.2784, 8) == (pytest.approx((0.7785 + 4) / 255), -0.2785)


def test_grids_begin_where_they_should():
    for offset, ends in ((None, (-0.8, 0.7)), (0.0, (0.0, 1.5)), (-0.2785, (-0.2785, 1.2215))):
        low, high = Start(0.1, offset).edges(np.array([0.1]), 4)
        np.testing.assert_allclose([low[0], high[0]], ends, rtol=1e-6)
        scale, zero = Grid(4, symmetric=False).from_range(jnp.asarray(low), jnp.asarray(high))
        np.testing.assert_allclose(scale, [0.1], rtol=1e-5)  # float32
        assert float(zero[0]) == {None: 0.0, 0.0: -8.0, -0.2785: -5.0}[offset]  # a code: 0.3 below zero, not 0.2785


def test_networks_find_the_cheapest_step_of_each_timestep():
    how = TimestepScales(**QUICK)
    timesteps = np.linspace(20, 980, 9)
    best = np.stack([2.0 ** (timesteps / 500 - 1), 2.0 ** (1 - timesteps / 800)])  # over s0
    places = np.log2(how.factors)
    costs = 1 + (places - np.log2(best)[..., None]) ** 2  # layers timesteps candidates
    start = np.array([0.3, 7.0])
    found = learned_steps(start, timesteps, costs, how)
    # Between candidates, a quarter of an octave apart, costs are straight lines, whose least is at a candidate.
    assert np.abs(np.log2(found / start[:, None] / best)).max() < 0.25
    # As they start, networks say about s0 at every timestep; three layers of random values are added to the bias.
    early = learned_steps(start, timesteps, costs, TimestepScales(iterations=1, rate=1e-6))
    assert np.abs(np.log2(early / start[:, None])).max() < 0.5


class Block(nnx.Module):
    """A layer of inputs about zero, and one of inputs behind a SiLU."""

    def __init__(self):
        keys = jax.random.split(jax.random.key(0))
        shared = {"axes": (None, None)}
        self.first = Linear(5, 6, role="query", key=keys[0], **shared)
        self.second = Linear(6, 5, role="feed_forward_out", key=keys[1], **shared)

    def __call__(self, x, conditioning):
        return self.second(jax.nn.silu(self.first(x)))


BATCHES = [growing_latents([900.0, 500.0]), growing_latents([100.0]), growing_latents([900.0, 300.0], seed=1)]


@pytest.mark.parametrize("objective", ["input", "output"])
def test_larger_inputs_have_larger_steps(objective):
    recipe = get("tdq-w8a4", objective=objective, **QUICK)
    model = qvdjax.quantize(OneBlock(Block()), recipe, BATCHES, execution="simulate")
    layers = {names[0]: layer for names, _, layer in layers_of(model, QUANTIZED_LAYERS)}
    for layer in layers.values():
        assert layer.scheme.activation.timesteps == (100.0, 300.0, 500.0, 900.0)
        # From the smallest inputs to the largest; between, one video says little about what is best.
        scales = np.asarray(layer.input_scale[...])[:, 0]
        assert scales[0] < 0.7 * scales[-1], scales
    # Inputs about zero have a code for it in the middle, those behind a SiLU near the end.
    np.testing.assert_array_equal(layers["block.first"].input_zero_point[...], 0)
    assert (np.asarray(layers["block.second"].input_zero_point[...]) < -6).all()
    error = lambda made, one: float(jnp.square(made(**one) - OneBlock(Block())(**one)).sum())  # noqa: E731
    one_range = qvdjax.quantize(
        OneBlock(Block()), get("mse-w8a4", activation_symmetric=False), BATCHES, execution="simulate"
    )
    # The smallest inputs, a ninth of the largest, gain most; measured a quarter, and half leaves room for the networks.
    assert error(model, growing_latents([100.0], 3)) < 0.5 * error(one_range, growing_latents([100.0], 3))
    integer = qvdjax.quantize(OneBlock(Block()), recipe, BATCHES, execution="integer")
    given = growing_latents([900.0, 100.0], 4)
    np.testing.assert_allclose(integer(**given), model(**given), rtol=1e-5, atol=1e-4)  # the same integers


def test_what_is_refused():
    schemes = decide(OneBlock(Block()), get("tdq-w8a8")).schemes
    with pytest.raises(UserError, match="calibration set is empty"):
        timestep_ranges(OneBlock(Block()), schemes, [], TimestepScales())
    broken = growing_latents([100.0])
    broken["latents"] = broken["latents"].at[0, 0].set(jnp.nan)
    with pytest.raises(UserError, match="not finite"):
        timestep_ranges(OneBlock(Block()), schemes, [broken], TimestepScales())
    for option in ({"objective": "weights"}, {"dropout": 1.0}, {"candidates": 1}, {"activation_symmetric": True}):
        with pytest.raises(UserError):
            get("tdq-w8a8", **option)
