"""The operation alone: codes of every grid. Layers, borders and devices: tests/qvdjax/nn/test_conv.py."""

import chex
import jax
import jax.numpy as jnp
import pytest

from qvdjax.errors import UserError
from qvdjax.kernels import quantized_convolution, quantized_convolution_choice
from qvdjax.numerics import QTensor, Quantizer, quantize

PLACE = {"kernel": (3, 3), "stride": (2, 1), "padding": ((1, 0), (1, 1)), "dtype": jnp.float32}


def operands(codebook):
    """Codes of an input [2, 5, 7, 4] with one scale, and of a weight [6, (4 3 3)]."""
    x, weight = (jax.random.normal(jax.random.key(i), size) for i, size in enumerate([(2, 5, 7, 4), (6, 36)]))
    codes = quantize(x.reshape(1, -1), Quantizer(8, granularity="tensor"), jnp.int8)
    x = QTensor(codes.codes.reshape(x.shape), codes.scale.reshape(1, 1, 1, 1), None, 8)
    return x, quantize(weight, Quantizer(8 if codebook == "float8_e4m3fn" else 4, codebook=codebook))


def test_levels_of_a_codebook_are_multiplied_not_their_numbers():
    x, weight = operands("gaussian")
    expected = quantized_convolution(x, weight, **PLACE, implementation="simulate")
    for implementation in ("xla", "bfloat16"):
        found = quantized_convolution(x, weight, **PLACE, implementation=implementation)
        chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)  # float32 sums of 36 terms near 1


def test_float8_is_simulated_and_refused_by_name():
    x, weight = operands("float8_e4m3fn")
    choice = quantized_convolution_choice(x, weight, **PLACE)
    assert choice.implementation == "simulate"
    assert dict(choice.refused)["xla"] == dict(choice.refused)["bfloat16"] == "codes of float8 have no convolution"
    with pytest.raises(UserError, match="bfloat16 cannot be run: codes of float8"):
        quantized_convolution(x, weight, **PLACE, implementation="bfloat16")
