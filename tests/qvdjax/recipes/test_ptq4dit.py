"""ptq4dit: which layers are balanced, static inputs, learned rounding behind the balance, folders."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from round_trip import check_round_trip
from small_models import WAN, unet, unet_inputs, wan, wan_inputs

import models
import qvdjax
from qvdjax.calibration.ranges import input_ranges
from qvdjax.calibration.salience import input_saliences
from qvdjax.errors import UserError
from qvdjax.nn import QuantizedLinear, layers_of
from qvdjax.ptq import set_execution
from qvdjax.recipes import decide, get

run = jax.jit(lambda model, inputs: model(**inputs))
SHORT = {"iterations": 30, "rate": 0.05}


def relative_error(candidate, reference) -> float:
    return float(jnp.square(candidate - reference).sum() / jnp.square(reference).sum())


def test_the_second_layer_of_the_feed_forward_is_not_balanced():
    schemes = decide(models.abstract(WAN), get("ptq4dit-w4a8")).schemes
    plain, balanced = schemes["blocks.0.ffn.net.2"], schemes["blocks.0.ffn.net.0.proj"]
    assert (plain.transforms, balanced.transforms) == ((), ("smooth_scale",))
    assert plain.weight == balanced.weight
    assert plain.activation == balanced.activation


def test_the_scale_is_the_balance_of_saliences():
    model, batches = wan(num_layers=2), [wan_inputs()]
    quantized = qvdjax.quantize(model, get("ptq4dit-w8a8", learn=False), batches)
    name, weight = "blocks.1.ffn.net.0.proj", np.asarray(model.stacks[0].block.ffn.net["0"].proj.weight[...][1])
    salience = np.asarray(input_saliences(model, batches)[name][1], np.float64)
    wanted = np.sqrt(salience / np.abs(weight).max(axis=0))
    layer = {n: (layer, i) for names, _, layer in layers_of(quantized, (QuantizedLinear,)) for i, n in enumerate(names)}
    found, block = layer[name]
    np.testing.assert_allclose(found.transform.smooth_scale[...][block], wanted, rtol=1e-5)
    low, high = input_ranges(model, batches)[name]
    assert (np.maximum(-low, high) > 1.01 * salience).any()  # a mean over two timesteps, no largest value
    assert get("ptq4dit-w8a8", salience="largest").channel_statistics == "all"


@pytest.mark.parametrize("static", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rounding_is_learned_behind_it_and_executions_agree(static, tmp_path):
    model, batches = wan(num_layers=2), [wan_inputs(batch=1, seed=seed) for seed in (1, 2)]
    learned = qvdjax.quantize(model, get("ptq4dit-w3a8", static=static, **SHORT), batches, execution="integer")
    nearest = qvdjax.quantize(model, get("ptq4dit-w3a8", static=static, learn=False), batches)
    exact = [run(model, inputs) for inputs in batches]
    error = lambda one: sum(relative_error(run(one, b), e) for b, e in zip(batches, exact, strict=True))  # noqa: E731
    assert error(learned) < error(nearest)
    layer = learned.stacks[0].block.attn1.to_q
    if static:
        chex.assert_trees_all_equal(layer.input_scale[...], nearest.stacks[0].block.attn1.to_q.input_scale[...])
    assert (layer.input_scale is not None) == static
    simulated = set_execution(nnx.clone(learned), "simulate")
    # One in some thousand codes of inputs flips; as for every recipe.
    assert relative_error(run(simulated, batches[0]), run(learned, batches[0])) < 1e-4
    loaded = check_round_trip(set_execution(learned, qvdjax.best_execution()[0]), tmp_path)
    chex.assert_trees_all_equal(run(loaded, batches[0]), run(learned, batches[0]))


@pytest.mark.slow
def test_video_unets():
    model, inputs = unet(), unet_inputs()
    quantized = qvdjax.quantize(model, get("ptq4dit-w8a8", static=True, learn=False), [inputs])
    # A step of 1/127 of a range in some thirty layers, random weights that make it larger.
    assert relative_error(run(quantized, inputs), run(model, inputs)) < 0.05


@pytest.mark.parametrize(("options", "message"), [
    ({"salience": "pearson"}, "use spearman or largest"),
    ({"static": "true", "activation_group_size": "16"}, "leave codebook and activation_group_size out"),
    ({"codebook": "gaussian"}, "leave codebook out"),
    ({"beta_end": "30"}, "has to fall"),
])  # fmt: skip
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        get("ptq4dit-w4a4", **options)
