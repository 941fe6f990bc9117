"""Linear layers in float, simulated and integer execution."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, QuantizedLinear
from qvdjax.numerics import Quantizer, fake_quantize_dynamic
from qvdjax.ptq import FitChannelScale, quantize_layer

WIDTH, OUT = 40, 7


def linear(bias=True, dtype=jnp.float32):
    layer = Linear(WIDTH, OUT, role="query", axes=("heads", "embed"), key=jax.random.key(0), dtype=dtype, bias=bias)
    if bias:
        layer.bias[...] = jnp.arange(OUT, dtype=dtype)
    return layer


def inputs(*shape):
    return jax.random.normal(jax.random.key(1), (*shape, WIDTH)) + 0.5


def scheme(weight_bits=4, activation_bits=8, **fields):
    activation = Quantizer(activation_bits, granularity="token", dynamic=True)
    return LayerScheme(**{"weight": Quantizer(weight_bits), "activation": activation, **fields})


def test_float_linear_is_the_textbook_product():
    layer, x = linear(), inputs(2, 3)
    expected = np.asarray(x) @ np.asarray(layer.weight[...]).T + np.arange(OUT)
    chex.assert_trees_all_close(layer(x), expected.astype(np.float32), rtol=1e-5)  # float32 sums of 40 terms


@pytest.mark.parametrize(("weight_bits", "activation_bits"), list(itertools.product((2, 3, 4, 6, 8), (3, 4, 6, 8))))
def test_integer_and_simulated_execution_agree(weight_bits, activation_bits):
    x, choice = inputs(2, 5), scheme(weight_bits, activation_bits)
    integer, simulated = (quantize_layer(linear(), choice, execution=e)(x) for e in ("integer", "simulate"))
    chex.assert_trees_all_close(integer, simulated, rtol=1e-5, atol=1e-5)  # float32 sums of 40 terms near 1


def test_execution_is_what_the_name_says():
    x = inputs(2, 5)
    text = {e: str(jax.make_jaxpr(quantize_layer(linear(), scheme(), execution=e))(x)) for e in ("integer", "simulate")}
    assert "preferred_element_type=int32" in text["integer"]
    assert "int32" not in text["simulate"].split("dot_general")[1]


def test_weight_only_layers_multiply_floats():
    layer = quantize_layer(linear(), scheme(activation=None), execution="integer")
    x = inputs(3)
    expected = x @ layer.qweight.dequantize().T + jnp.arange(OUT)
    chex.assert_trees_all_close(layer(x), expected, rtol=1e-5)  # float32 sums of 40 terms


def test_activation_only_layers_keep_their_weight():
    source = linear()
    layer = quantize_layer(source, scheme(weight=None), execution="integer")
    chex.assert_trees_all_equal(layer.weight[...], source.weight[...])
    x = inputs(2, 3)
    fake = fake_quantize_dynamic(x, scheme().activation)
    chex.assert_trees_all_close(layer(x), source(fake), rtol=1e-5)  # float32 sums of 40 terms


def test_static_range_comes_from_calibration():
    low, high = jnp.full((WIDTH,), -1.0), jnp.full((WIDTH,), 3.0)
    activation = Quantizer(8, False, "tensor")
    layer = quantize_layer(linear(), scheme(activation=activation), execution="integer", input_range=(low, high))
    np.testing.assert_allclose(layer.input_scale[...], [[4 / 255]], rtol=1e-6)
    clipped = layer(jnp.full((1, WIDTH), 100.0))
    chex.assert_trees_all_close(clipped, layer(jnp.full((1, WIDTH), 3.0)), rtol=1e-6)  # both take the last code


def test_channel_scale_changes_nothing_but_the_rounding():
    """Before rounding, scaled inputs times the scaled weight are the layer's own product."""
    x = inputs(4, 6) * jnp.geomspace(0.1, 30, WIDTH)
    edges = (x.min(axis=(0, 1)), x.max(axis=(0, 1)))
    choice = scheme(8, 8, transforms=("smooth_scale",))
    layer = quantize_layer(linear(), choice, execution="integer", fit=FitChannelScale(0.5), input_range=edges)
    unrounded = layer.transform(x) @ layer.transform.on_weight(linear().weight[...]).T + jnp.arange(OUT)
    chex.assert_trees_all_close(unrounded, linear()(x), rtol=1e-4, atol=1e-3)  # sums of 40 terms up to 60 in size
    plain = quantize_layer(linear(), scheme(8, 8), execution="integer")
    error = lambda candidate: float(jnp.square(candidate(x) - linear()(x)).mean())  # noqa: E731
    assert error(layer) < 0.5 * error(plain)


def test_channel_scale_is_smoothquants_formula():
    weight, high = jnp.array([[0.5, -2.0], [1.0, 1.0]]), jnp.array([4.0, 9.0])
    fitted = FitChannelScale(0.5).fit(weight, -high, high)
    chex.assert_trees_all_close(fitted.smooth_scale[...], jnp.array([2.0, 3.0 / 2**0.5]), rtol=1e-6)
    with pytest.raises(ValueError, match="alpha"):
        FitChannelScale(1.5)


def test_bfloat16_layers_keep_the_type_of_their_input():
    layer = quantize_layer(linear(dtype=jnp.bfloat16), scheme(), execution="integer")
    assert layer(inputs(2, 3).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_stack_is_quantized_row_by_row():
    stack = jax.vmap(
        lambda key: Linear(WIDTH, OUT, role="query", axes=("heads", "embed"), key=key)
    )(jax.random.split(jax.random.key(3), 3))  # fmt: skip
    quantized = quantize_layer(stack, scheme(), execution="integer")
    for i in range(3):
        alone = quantize_layer(jax.tree.map(lambda a, i=i: a[i], stack), scheme(), execution="integer")
        row = jax.tree.map(lambda a, i=i: a[i], quantized)
        chex.assert_trees_all_close(jax.tree.leaves(row), jax.tree.leaves(alone), rtol=1e-6)


def test_a_group_that_does_not_divide_is_refused_with_its_remedy():
    weight = Quantizer(4, granularity="group", group_size=16)
    with pytest.raises(UserError, match="16 does not divide"):
        quantize_layer(linear(), scheme(weight=weight), execution="integer")


def test_quantized_weights_are_materialised_once():
    """Quantizing bfloat16 weights gives the codes of their float32 values, whatever jit makes of it."""
    source = linear(dtype=jnp.bfloat16)
    quantized = quantize_layer(source, scheme(), execution="integer")
    weight = np.asarray(source.weight[...], np.float32)
    step = np.abs(weight).max(axis=1, keepdims=True) / 7
    chex.assert_trees_all_equal(
        np.asarray(quantized.codes[...].astype(jnp.int8)), np.round(weight / step).astype(np.int8)
    )
    assert isinstance(quantized, QuantizedLinear)
