"""Layers quantized for each interval of timesteps: which codes meet which sample, folders, and what is refused."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import hunyuanvideo, hunyuanvideo_inputs, wan, wan_inputs

import conversion
import models
import qvdjax
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, IntervalLinear, LayerScheme, TimestepIntervals, layers_of
from qvdjax.nn.protocol import block_at_timestep
from qvdjax.nn.variables import at, dotted, iterate
from qvdjax.numerics import Quantizer
from qvdjax.ptq import set_execution

RECIPE = qvdjax.recipes.get("vidit-q-w4a4", timestep_intervals=2, block=8)
ALONE = qvdjax.recipes.get("vidit-q-w4a4", block=8)
predict = jax.jit(lambda model, inputs: model(**inputs))


def inputs_at(*timesteps: float, seed: int = 0) -> dict:
    return {**wan_inputs(batch=len(timesteps), seed=seed), "timestep": jnp.array(timesteps)}


def calibrated() -> list[dict]:
    """Inputs that are larger near noise, so that the intervals get scales of their own; one batch is in both."""
    early, late, both = inputs_at(900.0, 700.0), inputs_at(400.0, 100.0, seed=1), inputs_at(600.0, 500.0, seed=2)
    return [{**early, "latents": 3 * early["latents"]}, late, both]


@pytest.fixture(scope="module")
def model():
    return wan()


@pytest.fixture(scope="module")
def quantized(model):
    return qvdjax.quantize(model, RECIPE, calibrated(), execution="integer")


@pytest.fixture(scope="module")
def alone(model):
    """Quantized by the samples of each interval, and by nothing else."""
    batches = calibrated()
    one = lambda inputs, row: {name: array[row : row + 1] for name, array in inputs.items()}  # noqa: E731
    late, early = [batches[1], one(batches[2], 1)], [batches[0], one(batches[2], 0)]
    return [qvdjax.quantize(model, ALONE, part, execution="integer") for part in (late, early)]


@hypothesis.given(ends=st.sets(st.integers(1, 999), min_size=1, max_size=5), timestep=st.integers(0, 1000))
def test_every_timestep_is_in_the_interval_whose_end_it_does_not_exceed(ends, timestep):
    intervals = TimestepIntervals(tuple(map(float, sorted(ends))))
    number = int(intervals.of(jnp.array([float(timestep)]))[0])
    edges = [-1, *sorted(ends), 1000]
    assert edges[number] < timestep <= edges[number + 1]
    assert len(intervals) == len(ends) + 1


def test_two_are_those_of_the_release():
    intervals = TimestepIntervals.alike(2)
    assert intervals.of(jnp.array([0.0, 500.0, 501.0, 1000.0])).tolist() == [0, 0, 1, 1]
    assert [intervals.name(number) for number in range(2)] == ["0 to 500", "500 to 1000"]


def cut_layers(model) -> dict:
    """Layers of the first block by name, those that are cut."""
    block = model.stacks[0].layer(0)
    return {dotted(path): layer for path, layer in iterate(block, IntervalLinear)}


def test_every_interval_has_the_codes_of_its_own_inputs(quantized, alone):
    for path, layer in cut_layers(quantized).items():
        for number, mine in enumerate(layer.intervals):
            theirs = nnx.to_flat_state(nnx.state(at(alone[number].stacks[0].layer(0), tuple(path.split(".")))))
            for (name, one), (other_name, other) in zip(nnx.to_flat_state(nnx.state(mine)), theirs, strict=True):
                assert name == other_name
                np.testing.assert_array_equal(one.get_value(), other.get_value())
        assert not np.array_equal(*(one.transform.smooth_scale[...] for one in layer.intervals))


@pytest.mark.parametrize("execution", ["simulate", "integer"])
@pytest.mark.parametrize("timesteps", [(999.0, 501.0), (500.0, 3.0), (999.0, 500.0)], ids=["high", "low", "both"])
def test_each_sample_meets_the_codes_of_its_timestep(quantized, execution, timesteps):
    block = block_at_timestep(set_execution(quantized, execution).stacks[0].layer(0), jnp.array(timesteps))
    call = jax.jit(lambda layer, x: layer(x))
    for name in ("attn1.to_q", "ffn.net.2"):
        layer = at(block, tuple(name.split(".")))
        width = layer.intervals[0].codes.get_value().shape[-1]
        x = jax.random.normal(jax.random.key(3), (4, 5, width))  # two rows of each sample, one after the other
        found, each = call(layer, x), [call(one, x) for one in layer.intervals]
        for row in range(4):
            mine = each[timesteps[row // 2] > 500][row]
            # One product of the same codes in two programs: float32 sums of up to 100 terms.
            np.testing.assert_allclose(found[row], mine, atol=1e-5 * float(jnp.abs(mine).max()))
        assert float(jnp.abs(each[0] - each[1]).mean()) > 1e-2 * float(jnp.abs(each[0]).mean())


def test_only_products_behind_the_scale_are_cut(quantized):
    cut = [layer for _, _, layer in layers_of(quantized, QUANTIZED_LAYERS) if isinstance(layer, IntervalLinear)]
    assert cut
    rows = qvdjax.describe(quantized)
    for row in rows:
        assert ("each of 2 intervals of timesteps" in row["reason"]) == (row["activation_bits"] == 4)
    assert [row["path"] for row in rows] == [row["path"] for row in qvdjax.describe(wan())]


def test_bytes_are_those_of_all_codes(model, quantized, alone):
    cut, each = qvdjax.describe(quantized), [qvdjax.describe(one) for one in alone]
    for row, *ones in zip(cut, *each, strict=True):
        if row["activation_bits"] != 4:
            continue
        assert row["bytes"] == sum(one["bytes"] for one in ones)
        assert row["sqnr_db"] == min(one["sqnr_db"] for one in ones)
    assert parameter_count(quantized) == parameter_count(model)


def test_it_is_stored_and_loaded(quantized, tmp_path):
    models.save(quantized, tmp_path / "m")
    inputs = inputs_at(800.0, 20.0)
    loaded = models.load(tmp_path / "m", execution="integer")
    np.testing.assert_array_equal(predict(loaded, inputs), predict(set_execution(quantized, "integer"), inputs))
    with pytest.raises(UserError, match="each interval of timesteps have no form in other formats"):
        conversion.export(tmp_path / "m", tmp_path / "plain", "diffusers")


def test_schemes_survive_json():
    scheme = LayerScheme(Quantizer(4), timestep_intervals=TimestepIntervals((100.0, 250.5)))
    assert LayerScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert "timestep_intervals" not in dataclasses.replace(scheme, timestep_intervals=None).to_dict()


@pytest.mark.slow
def test_models_of_two_streams_take_it():
    inputs = {**hunyuanvideo_inputs(), "timestep": jnp.array([900.0, 100.0])}
    quantized = qvdjax.quantize(hunyuanvideo(), qvdjax.recipes.get("vidit-q-w8a8", timestep_intervals=2), [inputs])
    found, wanted = predict(quantized, inputs), predict(hunyuanvideo(), inputs)
    # Some forty products in a row, each with errors of some 1e-3 to 1e-2 from eight bits.
    assert 1e-3 < float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 1e-1


def test_what_makes_no_sense_is_refused(model):
    with pytest.raises(UserError, match="no timestep from 500 to 1000"):
        qvdjax.quantize(model, RECIPE, [inputs_at(500.0, 1.0)])
    with pytest.raises(UserError, match="at least two intervals, not 0"):
        qvdjax.recipes.get("vidit-q-w4a4", timestep_intervals=0)
    with pytest.raises(UserError, match="same bits"):
        qvdjax.recipes.get("vidit-q-w4a4", timestep_intervals=2, average_bits=5.0)
    for ends in ((), (3.0, 3.0), (5.0, 2.0), (float("inf"),)):
        with pytest.raises(ValueError, match="each above the one before"):
            TimestepIntervals(ends)
