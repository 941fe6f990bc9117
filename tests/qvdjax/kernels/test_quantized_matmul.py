"""Integer and simulated products agree to float32 rounding."""

import itertools

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from qvdjax.errors import UserError
from qvdjax.kernels import quantized_matmul
from qvdjax.kernels.quantized_matmul import MAXIMUM_WIDTH
from qvdjax.numerics import BITS, QTensor, Quantizer, quantize

# Simulation rounds every one of `width` products and sums to float32; integers are exact until the scales. The
# worst case is width * 2**-24 of the sum of magnitudes; against the largest output 1e-5 leaves a margin at width 40.
TOLERANCE = 1e-5


def agree(x, weight):
    integer, simulated = quantized_matmul(x, weight), quantized_matmul(x, weight, implementation="simulate")
    chex.assert_equal_shape([integer, simulated])
    magnitudes = jnp.abs(x.dequantize()) @ jnp.abs(weight.dequantize()).T
    chex.assert_trees_all_close(integer, simulated, atol=TOLERANCE * float(magnitudes.max()), rtol=0)


@pytest.mark.parametrize(("activation_bits", "weight_bits"), list(itertools.product(BITS, BITS)))
def test_every_pair_of_bits(activation_bits, weight_bits):
    random = np.random.default_rng(activation_bits * 10 + weight_bits)
    x = jnp.asarray(random.standard_normal((5, 40)), jnp.float32)
    weight = jnp.asarray(random.standard_normal((7, 40)), jnp.float32)
    agree(quantize(x, Quantizer(activation_bits, granularity="token")), quantize(weight, Quantizer(weight_bits)))


@given(
    st.integers(0, 2**31), st.sampled_from(list(BITS)), st.sampled_from(list(BITS)), st.booleans(), st.booleans(),
    st.sampled_from(["tensor", "token", "group"]), st.sampled_from(["tensor", "channel", "group"]),
    st.floats(-3, 3),
)  # fmt: skip
@settings(max_examples=50)
def test_every_grid_and_granularity(
    seed, x_bits, weight_bits, x_symmetric, weight_symmetric, x_kind, weight_kind, mean
):
    random = np.random.default_rng(seed)
    x = jnp.asarray(random.standard_normal((2, 3, 24)) + mean, jnp.float32)
    weight = jnp.asarray(random.standard_normal((5, 24)), jnp.float32)
    size = lambda kind: 8 if kind == "group" else None  # noqa: E731
    agree(
        quantize(x, Quantizer(x_bits, x_symmetric, x_kind, size(x_kind)), jnp.int8),
        quantize(weight, Quantizer(weight_bits, weight_symmetric, weight_kind, size(weight_kind))),
    )


def test_fractional_zero_points():
    """Learned zero points are no integers; their fraction is added in floats."""
    x = quantize(jax.random.normal(jax.random.key(0), (6, 32)), Quantizer(4, False, "token"), jnp.int8)
    weight = quantize(jax.random.normal(jax.random.key(1), (5, 32)), Quantizer(4, False))
    agree(
        QTensor(x.codes, x.scale, x.zero_point + 0.3, 4),
        QTensor(weight.codes, weight.scale, weight.zero_point - 0.2, 4),
    )


def test_zero_points_beyond_the_codes():
    """Training may push one there. Its integer part times a sum of codes would leave int32 at real widths."""
    width = 13824
    x = quantize(jax.random.normal(jax.random.key(0), (2, width)), Quantizer(8, False, "token"), jnp.int8)
    weight = quantize(jax.random.normal(jax.random.key(1), (3, width)), Quantizer(8, False))
    agree(x, QTensor(weight.codes, weight.scale, jnp.array([[-3000.3], [90000.0], [130.2]]), 8))


def test_integer_sums_are_exact_at_real_widths():
    """At 13,824 products of the largest codes the int32 sum is exact; a float32 sum of the same is not."""
    codes = jnp.full((1, 13824), 127, jnp.int8).at[0, -1].set(126)
    one = jnp.ones((1, 1), jnp.float32)
    total = quantized_matmul(QTensor(codes, one, None, 8), QTensor(jnp.full((1, 13824), 127, jnp.int8), one, None, 8))
    exact = 127 * (13823 * 127 + 126)
    assert total.item() == np.float32(exact)


def test_refusals():
    one = jnp.ones((1, 1), jnp.float32)
    wide = QTensor(jnp.zeros((1, MAXIMUM_WIDTH + 1), jnp.int8), one, None, 8)
    with pytest.raises(ValueError, match="int32"):
        quantized_matmul(wide, wide)
    narrow = QTensor(jnp.zeros((1, 8), jnp.int8), one, None, 8)
    with pytest.raises(UserError, match="unknown implementation"):
        quantized_matmul(narrow, narrow, implementation="magic")


def test_the_program_holds_an_integer_product():
    x = quantize(jax.random.normal(jax.random.key(0), (6, 32)), Quantizer(8, granularity="token"))
    weight = quantize(jax.random.normal(jax.random.key(1), (5, 32)), Quantizer(4))
    text = str(jax.make_jaxpr(quantized_matmul)(x, weight))
    assert "preferred_element_type=int32" in text
