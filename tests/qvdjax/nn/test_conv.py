"""Convolutions against PyTorch, and their quantized forms."""

import contextlib
import importlib

import chex
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from qvdjax.errors import UserError
from qvdjax.kernels import Device
from qvdjax.nn import Conv, LayerScheme, Rotation
from qvdjax.numerics import Quantizer
from qvdjax.parallel import topology_mesh
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
    simulated, integer = (quantize_layer(conv, scheme, execution=e) for e in ("simulate", "integer"))
    expected = simulated(x)
    for implementation in (None, "bfloat16") if case in ("3d", "patches") else (None, "bfloat16", "xla"):
        integer.implementation = implementation
        # float32 sums of up to 108 terms near 1
        chex.assert_trees_all_close(integer(x), expected, rtol=1e-5, atol=2e-5)


def equations(jaxpr):
    """All of a program's, those of the functions that it calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if isinstance(value, jax.extend.core.ClosedJaxpr):
                yield from equations(value.jaxpr)


def multiplied(case, implementation=None, dtype=jnp.float32, slice_name=None):
    """The types of what a quantized convolution multiplies and adds up to, and the axes of its input."""
    conv, x = make(case)
    scheme = LayerScheme(Quantizer(8), Quantizer(8, True, "tensor", dynamic=True))
    layer = quantize_layer(conv, scheme, execution="integer")
    layer.implementation = implementation
    x = x.astype(dtype)
    with contextlib.nullcontext() if slice_name is None else jax.set_mesh(topology_mesh(slice_name)):
        program = jax.make_jaxpr(layer)(x)
    (product,) = [eqn for eqn in equations(program.jaxpr) if eqn.primitive.name == "conv_general_dilated"]
    (left, right), total = (str(operand.aval.dtype) for operand in product.invars), product.outvars[0].aval.dtype
    assert left == right
    return left, str(total), product.invars[0].aval.ndim


@pytest.mark.parametrize("case", ["2d", "3d over frames"])
def test_what_convolutions_multiply(case):
    assert multiplied(case) == ("float32", "float32", 4)
    assert multiplied(case, "xla") == ("int8", "int32", 4)
    assert multiplied(case, "bfloat16") == ("bfloat16", "float32", 4)


def test_convolutions_that_mix_three_axes_multiply_floats():
    assert multiplied("3d") == ("float32", "float32", 5)


@pytest.mark.tpu_compile
def test_what_convolutions_multiply_on_a_tpu():
    assert multiplied("2d", slice_name="v5e:2x4") == ("int8", "int32", 4)
    assert multiplied("3d over frames", slice_name="v5e:2x4") == ("int8", "int32", 4)
    assert multiplied("3d", slice_name="v5e:2x4") == ("bfloat16", "float32", 5)
    assert multiplied("2d", slice_name="tpu7x:2x2x1") == ("bfloat16", "float32", 4)


def test_what_convolutions_multiply_on_a_gpu(monkeypatch):
    module = importlib.import_module("qvdjax.kernels.quantized_convolution")  # the function has its name
    monkeypatch.setattr(module, "target", lambda: Device("gpu", "NVIDIA H200"))
    assert multiplied("2d", dtype=jnp.bfloat16) == ("bfloat16", "bfloat16", 4)
    assert multiplied("2d") == ("float32", "float32", 4)
    with pytest.raises(UserError, match="xla cannot be run: convolutions of int8 are unreliable on GPU"):
        multiplied("2d", "xla")


def test_what_a_convolution_cannot_be_computed_by_is_said():
    with pytest.raises(UserError, match="xla cannot be run: convolutions of int8 over three axes"):
        multiplied("3d", "xla")
    with pytest.raises(UserError, match="pallas_tpu cannot be run: no such kernel was written"):
        multiplied("2d", "pallas_tpu")


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
