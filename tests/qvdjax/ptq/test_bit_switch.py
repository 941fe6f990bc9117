"""Bits that switch over the steps: where predictions change, and inputs that are rounded as either recipe rounds."""

import dataclasses
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import wan, wan_inputs

import models
import qvdjax
from qvdjax.calibration import Trajectory, collect
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, BitSwitch, LayerScheme, layers_of
from qvdjax.numerics import Quantizer
from qvdjax.ptq import SwitchBits, set_execution

TIMESTEPS = np.array([999.0, 700.0, 400.0, 100.0], np.float32)
OPTIONS = {"activation_group_size": None, "block": 8}
predict = jax.jit(lambda model, inputs: model(**inputs))


def trajectory(number: int, timesteps=TIMESTEPS) -> Trajectory:
    """Latents that change suddenly between the second and the third step."""
    draw = np.random.default_rng(number).standard_normal
    start, rest = draw((3, 8, 6, 5)), draw((3, 8, 6, 5))
    latents = np.stack([start, start + 1e-3 * rest, rest, rest + 1e-3 * start]).astype(np.float32)
    context = draw((7, 24)).astype(np.float32)
    return Trajectory(latents, timesteps, context, context)


def calibration(folder, make=trajectory):
    return collect(folder, {}, [{"prompt": "", "seed": seed} for seed in range(2)], make)


@pytest.fixture(scope="module")
def model():
    # Blind to the timestep, whose changes would drown those of the latents.
    model = wan()
    embedder = model.condition_embedder.time_embedder.linear_2
    embedder.weight[...] = 0 * embedder.weight[...]
    return model


@pytest.fixture(scope="module")
def switched(model, tmp_path_factory):
    samples = calibration(tmp_path_factory.mktemp("set") / "c")
    return qvdjax.quantize(
        model, qvdjax.recipes.get("dvd-quant-w4a4", **OPTIONS, switch=0.1), samples, execution="integer"
    )


@hypothesis.given(changes=st.lists(st.floats(0, 2), max_size=12), threshold=st.floats(0.01, 3))
def test_a_step_is_fine_where_changes_since_the_last_one_reach_the_threshold(changes, threshold):
    fine = SwitchBits(threshold).fine(changes)
    assert len(fine) == len(changes) + 1
    assert not fine[0]
    last = 0
    for step in range(1, len(fine)):
        # Added up in the order of the steps, as the rule does: a sum on the threshold may round to either side.
        total = 0.0
        for change in changes[last:step]:
            total += change
        assert fine[step] == (total >= threshold)
        last = step if fine[step] else last


def test_the_step_at_which_predictions_change_is_fine(switched):
    rows = [row for row in qvdjax.describe(switched) if row["activation_bits"] == 4]
    assert rows
    assert all("inputs of 8 bits at 1 of 4 timesteps" in row["reason"] for row in rows)
    switches = [layer.scheme.switch for _, _, layer in layers_of(switched, QUANTIZED_LAYERS)]
    switch = next(found for found in switches if found is not None)
    assert switch == BitSwitch(8, (100.0, 400.0, 700.0, 999.0), (False, True, False, False))
    assert switch.share == 0.25


@pytest.mark.parametrize("execution", ["simulate", "integer"])
def test_each_sample_is_rounded_as_the_bits_of_its_timestep_say(model, switched, execution):
    inputs = {**wan_inputs(batch=3, seed=5), "timestep": jnp.array([700.0, 410.0, 100.0])}
    found = predict(set_execution(switched, execution), inputs)
    for bits, samples in ((4, [0, 2]), (8, [1])):
        plain = qvdjax.quantize(model, qvdjax.recipes.get(f"dvd-quant-w4a{bits}", **OPTIONS), execution=execution)
        # The same operations on the same codes, compiled into another program: sums in float32 may be ordered
        # otherwise, and a value on the edge between two codes then falls to the other side, a step of 4 bits.
        difference = found[jnp.array(samples)] - predict(plain, inputs)[jnp.array(samples)]
        assert float(jnp.abs(difference).mean()) < 1e-3 * float(jnp.abs(found).mean())


def test_it_is_stored_and_loaded(switched, tmp_path):
    models.save(switched, tmp_path / "m")
    inputs = wan_inputs()
    np.testing.assert_array_equal(predict(models.load(tmp_path / "m"), inputs), predict(switched, inputs))


def test_schemes_survive_json():
    switch = BitSwitch(8, (1.0, 2.0), (True, False))
    scheme = LayerScheme(Quantizer(4), Quantizer(4, granularity="token", dynamic=True), switch=switch)
    assert LayerScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme
    assert "switch" not in dataclasses.replace(scheme, switch=None).to_dict()


def test_what_says_nothing_about_steps_is_refused(model, tmp_path):
    recipe = qvdjax.recipes.get("dvd-quant-w4a4", **OPTIONS, switch=0.1)
    with pytest.raises(UserError, match="needs a calibration set"):
        qvdjax.quantize(model, recipe)
    with pytest.raises(UserError, match="change from step to step"):
        qvdjax.quantize(model, recipe, [wan_inputs()])
    samples = calibration(tmp_path / "c", lambda number: trajectory(number, TIMESTEPS - number))
    with pytest.raises(UserError, match="different timesteps"):
        qvdjax.quantize(model, recipe, samples)
    with pytest.raises(UserError, match="threshold of changes must be positive"):
        qvdjax.recipes.get("dvd-quant-w4a4", switch=0.0)
    with pytest.raises(ValueError, match="dynamic range"):
        LayerScheme(Quantizer(4), switch=BitSwitch(8, (1.0,), (True,)))
