"""Inputs whose tokens' mean is rounded apart from how they differ."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from small_models import cogvideox, cogvideox_inputs, wan, wan_inputs

import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import Centering, InputClip, LayerScheme, Linear, QuantizedLinear
from qvdjax.numerics import Quantizer, fake_quantize_dynamic
from qvdjax.ptq import quantize_layer, set_execution
from qvdjax.ptq.reconstruction.flattened_weight import FlattenedWeight
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear
from qvdjax.recipes import get

TOKENS = Quantizer(4, granularity="token", dynamic=True)


def layer(scheme, execution="integer", width=24, out=7) -> QuantizedLinear:
    """A quantized layer of random weights."""
    linear = Linear(width, out, role="query", axes=("heads", "embed"), key=jax.random.key(3))
    return quantize_layer(linear, scheme, execution=execution)


def inputs(shape, offset=5.0):
    """Tokens that have a vector in common."""
    own, common = jax.random.split(jax.random.key(1))
    return jax.random.normal(own, shape) + offset * jax.random.normal(common, shape[-1:])


@pytest.mark.parametrize("shape", [(3, 5, 24), (2, 3, 1, 24), (3, 24)])
@pytest.mark.parametrize("activation", [TOKENS, Quantizer(3, False, "group", 8, dynamic=True)])
def test_integers_give_what_floats_give(shape, activation):
    scheme = LayerScheme(Quantizer(4, activation.symmetric), activation, centering=Centering())
    x = inputs(shape)
    integer, simulated = (layer(scheme, how)(x) for how in ("integer", "simulate"))
    chex.assert_shape(integer, (*shape[:-1], 7))
    # The same codes; float32 sums of 24 products of up to 100.
    chex.assert_trees_all_close(integer, simulated, rtol=1e-5, atol=1e-3)


@hypothesis.given(seed=st.integers(0, 99), bits=st.integers(2, 8), center_bits=st.integers(2, 8))
@hypothesis.settings(max_examples=12)
def test_what_meets_the_weight_is_the_rounded_centre_and_the_rounded_rest(seed, bits, center_bits):
    activation = Quantizer(bits, granularity="token", dynamic=True)
    centering = Centering(center_bits)
    x = inputs((2, 6, 24)) * (1 + seed)
    found = layer(LayerScheme(Quantizer(4), activation, centering=centering)).rounded_input(x)
    mean = x.mean(axis=1, keepdims=True)
    center = fake_quantize_dynamic(mean, Quantizer(center_bits, granularity="token", dynamic=True))
    expected = center + fake_quantize_dynamic(x - center, activation)
    chex.assert_trees_all_close(found, expected, rtol=1e-6)
    chex.assert_trees_all_close(centering.encoded(x).dequantize(), center, rtol=1e-6)
    # No value is further off than half a step of its token's range, whatever the centre's bits.
    step = jnp.abs(x - center).max(axis=-1, keepdims=True) / activation.grid.high
    assert bool((jnp.abs(found - x) <= step * 0.5 + 1e-4 * jnp.abs(x).max()).all())


def test_what_tokens_have_in_common_costs_nothing():
    scheme = LayerScheme(None, TOKENS, centering=Centering())
    near, far = (inputs((3, 50, 24), offset) for offset in (0.0, 30.0))
    error = lambda scheme, x: float(jnp.square(layer(scheme).rounded_input(x) - x).mean())  # noqa: E731
    # What is left of 30 times the common vector is the rest of the centre's 8 bits, 0.3 beside tokens of 1.
    assert error(scheme, far) < 1.5 * error(scheme, near)
    assert error(LayerScheme(None, TOKENS), far) > 100 * error(scheme, far)


def test_samples_do_not_see_each_other():
    scheme = LayerScheme(Quantizer(4), TOKENS, centering=Centering())
    for shape in ((3, 5, 24), (3, 24)):
        x = inputs(shape)
        together, alone = layer(scheme)(x), layer(scheme)(x[1:2])
        chex.assert_trees_all_close(together[1:2], alone, rtol=1e-6)


@pytest.mark.parametrize("clip", [None, InputClip()])
def test_a_layer_in_reconstruction_rounds_as_the_deployed_one(clip):
    scheme = LayerScheme(Quantizer(4), TOKENS, input_clip=clip, centering=Centering())
    linear = Linear(24, 7, role="query", axes=("heads", "embed"), key=jax.random.key(3))
    x = inputs((2, 6, 24))
    student = ReconstructedLinear(linear, scheme, FlattenedWeight(linear.weight[...], scheme, None), Known())
    deployed = layer(scheme)
    if clip is not None:
        deployed.input_clip[...] = student.learned()["input_clip"]
    chex.assert_trees_all_close(student.round_input(x), deployed.rounded_input(x), rtol=1e-6)
    # Centre and rest pass gradients on: together they are the input.
    gradient = jax.grad(lambda x: student.round_input(x).sum())(x)
    assert bool(jnp.isfinite(gradient).all())
    if clip is None:
        chex.assert_trees_all_close(gradient, jnp.ones_like(x), rtol=1e-5)


def test_where_it_belongs():
    with pytest.raises(ValueError, match="dynamic range"):
        LayerScheme(Quantizer(4), Quantizer(8, granularity="tensor"), centering=Centering())
    with pytest.raises(ValueError, match="2 to 8"):
        Centering(9)
    scheme = LayerScheme(Quantizer(4), TOKENS, centering=Centering(6))
    assert LayerScheme.from_dict(scheme.to_dict()) == scheme
    assert "centering" not in LayerScheme(Quantizer(4), TOKENS).to_dict()
    with pytest.raises(UserError, match="centered"):
        get("qvgen-w4a4", centered=True)
    weights_alone = get("rtn-w4a16", centered=True)
    assert all(rule.scheme.centering is None for rule in weights_alone.rules if isinstance(rule.scheme, LayerScheme))


@pytest.mark.parametrize(("model", "inputs"), [(wan, wan_inputs), (cogvideox, cogvideox_inputs)])
def test_a_model_of_centred_inputs_is_an_ordinary_one(model, inputs, tmp_path):
    model, inputs = model(), inputs()
    run = jax.jit(lambda model: model(**inputs))
    quantized = qvdjax.quantize(model, get("rtn-w8a4", centered=True), execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    error = lambda a, b: float(jnp.square(a - b).sum() / jnp.square(b).sum())  # noqa: E731
    assert error(run(simulated), run(quantized)) < 1e-4  # a flipped code of a thousand
    models.save(quantized, tmp_path / "model")
    chex.assert_trees_all_close(run(models.load(tmp_path / "model", execution="integer")), run(quantized), rtol=1e-6)
    # What has no tokens in common with others gains nothing; random weights make some in every model.
    assert error(run(quantized), run(model)) < error(run(qvdjax.quantize(model, "rtn-w8a4")), run(model))
