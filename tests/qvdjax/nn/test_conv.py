"""Convolutions against PyTorch, and their quantized forms."""

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Rotation
from qvdjax.numerics import Quantizer
from qvdjax.ptq import quantize_layer

CASES = {
    "1d": ((3,), (1,), ((1, 1),), (9,)),
    "2d": ((3, 3), (1, 1), ((1, 1), (1, 1)), (5, 7)),
    "2d strided": ((3, 3), (2, 2), ((1, 1), (1, 1)), (6, 7)),
    "2d uneven padding": ((3, 3), (2, 2), ((0, 1), (0, 1)), (6, 8)),
    "3d": ((3, 3, 3), (1, 1, 1), ((1, 1), (1, 1), (1, 1)), (4, 5, 6)),
    "3d over frames": ((3, 1, 1), (1, 1, 1), ((1, 1), (0, 0), (0, 0)), (4, 5, 6)),
    "patches": ((1, 2, 2), (1, 2, 2), ((0, 0),) * 3, (3, 4, 6)),
}


def make(case, key=0):
    kernel, stride, padding, size = CASES[case]
    conv = Conv(
        4, 6, kernel, role="convolution", axes=(None, None), key=jax.random.key(key), stride=stride, padding=padding
    )
    conv.bias[...] = jnp.arange(6.0)
    return conv, jax.random.normal(jax.random.key(key + 1), (2, *size, 4)) + 0.3


@pytest.mark.parametrize("case", CASES)
def test_against_pytorch(case):
    conv, x = make(case)
    _, stride, padding, size = CASES[case]
    channels_first = torch.tensor(np.moveaxis(np.asarray(x), -1, 1))
    padded = torch.nn.functional.pad(channels_first, [n for pair in reversed(padding) for n in pair])
    functions = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)
    weight, bias = (torch.tensor(np.asarray(a[...])) for a in (conv.weight, conv.bias))
    expected = np.moveaxis(functions[len(size) - 1](padded, weight, bias, stride).numpy(), 1, -1)
    chex.assert_trees_all_close(conv(x), expected, rtol=1e-4, atol=1e-5)  # float32 sums of up to 108 terms


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_integer_and_simulated_execution_agree_at_every_border(case, symmetric):
    conv, x = make(case)
    scheme = LayerScheme(Quantizer(4, symmetric), Quantizer(8, symmetric, "tensor", dynamic=True))
    integer, simulated = (quantize_layer(conv, scheme, execution=e)(x) for e in ("integer", "simulate"))
    chex.assert_trees_all_close(integer, simulated, rtol=1e-5, atol=2e-5)  # float32 sums of up to 108 terms near 1


def equations(jaxpr):
    """All of a program's, those of the functions that it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from equations(value.jaxpr)


@pytest.mark.parametrize(("case", "multiplies"), [("2d", "int8"), ("3d over frames", "int8"), ("3d", "float32")])
def test_which_convolutions_multiply_codes(case, multiplies):
    conv, x = make(case)
    scheme = LayerScheme(Quantizer(8), Quantizer(8, True, "tensor", dynamic=True))
    program = jax.make_jaxpr(quantize_layer(conv, scheme, execution="integer"))(x)
    (product,) = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "conv_general_dilated"]
    assert {str(operand.aval.dtype) for operand in product.invars} == {multiplies}
    assert product.invars[0].aval.ndim == (5 if case == "3d" else 4)


def test_quantized_convolution_approaches_the_float_one():
    conv, x = make("2d strided")
    scheme = LayerScheme(Quantizer(8), Quantizer(8, False, "tensor", dynamic=True))
    error = jnp.linalg.norm(quantize_layer(conv, scheme, execution="integer")(x) - conv(x)) / jnp.linalg.norm(conv(x))
    assert error < 0.01  # two 8-bit operands: about 2**-8 each


def test_a_sample_keeps_its_own_range():
    conv, x = make("2d")
    scheme = LayerScheme(Quantizer(8), Quantizer(8, True, "tensor", dynamic=True))
    layer = quantize_layer(conv, scheme, execution="integer")
    together = layer(jnp.concatenate([x[:1], 100 * x[1:]]))
    chex.assert_trees_all_close(together[:1], layer(x[:1]), rtol=1e-6)


def test_a_transform_that_mixes_channels_is_refused_on_a_convolution():
    conv, _ = make("2d")
    with pytest.raises(UserError, match="cannot carry rotation"):
        quantize_layer(conv, LayerScheme(Quantizer(8), None, ("rotation",), rotation=Rotation()), execution="integer")
