"""The fused linear kernel in interpret mode: the plain path's numbers, ragged sizes, zero rows, NaN, groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qvdjax.errors import UserError
from qvdjax.kernels import quantized_linear, quantized_linear_choice, quantized_matmul
from qvdjax.kernels.matmul_quantized_tpu import Blocks, fused_linear
from qvdjax.numerics import QTensor, Quantizer, quantize
from qvdjax.parallel import make_mesh, plan, topology_mesh

fused = functools.partial(fused_linear, interpret=True, blocks=Blocks(64, 128, 128))
TOKEN = Quantizer(8, granularity="token", dynamic=True)
FLOAT8 = Quantizer(8, granularity="token", dynamic=True, codebook="float8_e4m3fn")


def make(tokens=77, inputs=384, outputs=256, bits=8, group=None, batch=2, seed=0, codebook=None):
    """x [batch, tokens, inputs], the weight's codes, bias, gate [batch, 1, outputs] and residual."""
    keys = jax.random.split(jax.random.key(seed), 5)
    x = jax.random.normal(keys[0], (batch, tokens, inputs))
    kind = {"granularity": "group", "group_size": group} if group else {}
    weight = quantize(jax.random.normal(keys[1], (outputs, inputs)), Quantizer(bits, codebook=codebook, **kind))
    bias = jax.random.normal(keys[2], (outputs,))
    gate = jax.random.normal(keys[3], (batch, 1, outputs))
    return x, weight, bias, gate, jax.random.normal(keys[4], (batch, tokens, outputs))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (3, None), (8, 128), (4, 128)])
def test_equals_the_plain_path(bits, group):
    """77 tokens in blocks of 64: the last is ragged."""
    x, weight, bias, gate, residual = make(bits=bits, group=group)
    options = {"bias": bias, "gate": gate, "residual": residual}
    got = fused(x, weight, TOKEN, **options)
    plain = quantized_linear(x, weight, TOKEN, implementation="xla", **options)
    # The same codes but where a division rounds otherwise in the kernel's order, and the same int32 sums: a few float32
    # operations on values of about sqrt(384) = 20.
    np.testing.assert_allclose(got, plain, atol=5e-5)


@pytest.mark.parametrize("activation_bits", [4, 6])
def test_narrower_inputs(activation_bits):
    x, weight, *_ = make()
    activation = Quantizer(activation_bits, granularity="token", dynamic=True)
    np.testing.assert_allclose(
        fused(x, weight, activation), quantized_linear(x, weight, activation, implementation="xla"), atol=5e-5
    )


def test_float8_equals_the_plain_path():
    x, weight, bias, gate, residual = make(codebook=FLOAT8.codebook)
    options = {"bias": bias, "gate": gate, "residual": residual}
    got, plain = fused(x, weight, FLOAT8, **options), quantized_linear(x, weight, FLOAT8, **options)
    # Sums in float32 in another order; a division that rounds otherwise may move one code in thousands by an eighth.
    np.testing.assert_allclose(got, plain, atol=0.5)
    assert np.abs(got - plain).mean() < 1e-4
    zero, spoilt = x.at[0, 5].set(0), x.at[1, 70, 200].set(jnp.nan)
    assert (np.asarray(fused(zero, weight, FLOAT8))[0, 5] == 0).all()
    missing = np.isnan(fused(spoilt, weight, FLOAT8))
    assert missing[1, 70].all()
    assert missing.sum() == 256  # no other row


@pytest.mark.parametrize("tokens", [1, 31, 64, 65])
def test_any_number_of_tokens(tokens):
    x, weight, *_ = make(tokens, batch=1)
    got = fused(x[0], weight, TOKEN)
    assert got.shape == (tokens, 256)
    np.testing.assert_allclose(got, quantized_linear(x[0], weight, TOKEN, implementation="xla"), atol=5e-5)


def test_is_near_the_product_of_floats():
    x, weight, *_ = make()
    exact = np.asarray(x, np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    got = np.asarray(fused(x, weight, TOKEN), np.float64)
    # Inputs rounded to 1/127 of about 3.2 standard deviations: 0.73 % of one, uniform.
    assert 0.004 < np.linalg.norm(got - exact) / np.linalg.norm(exact) < 0.01


def test_extreme_scales_and_zero_rows():
    x, weight, *_ = make()
    x = x.at[0, 0].set(0).at[0, 1].multiply(1e30).at[0, 2].multiply(1e-30)
    got, plain = fused(x, weight, TOKEN), quantized_linear(x, weight, TOKEN, implementation="xla")
    assert (np.asarray(got)[0, 0] == 0).all()
    np.testing.assert_allclose(got / np.abs(plain).max(-1, keepdims=True).clip(1e-40),
                               plain / np.abs(plain).max(-1, keepdims=True).clip(1e-40), atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("function", [fused, functools.partial(quantized_linear, implementation="xla")])
def test_nan_comes_through(function):
    x, weight, *_ = make()
    spoilt = np.isnan(function(x.at[1, 70, 200].set(jnp.nan), weight, TOKEN))
    assert spoilt[1, 70].all()
    assert spoilt.sum() == 256  # no other row


def test_a_gate_a_token_and_half_precision():
    x, weight, bias, _, residual = make()
    x, residual = x.astype(jnp.bfloat16), residual.astype(jnp.bfloat16)
    gate = jax.random.normal(jax.random.key(8), residual.shape)
    options = {"bias": bias, "gate": gate, "residual": residual}
    got = fused(x, weight, TOKEN, **options)
    assert got.dtype == jnp.bfloat16
    plain = quantized_linear(x, weight, TOKEN, implementation="xla", **options)
    # Both round one float32 result once to bfloat16; on the edge they may part by one step of 2^-8.
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (got, plain)), rtol=2**-7)


def test_codes_as_bfloat16_give_the_same_product():
    x, weight, *_ = make(tokens=9)
    codes = quantize(x, TOKEN, jnp.int8)
    # Sums of 384 products of codes stay below 2^24 here, so float32 holds them exactly.
    np.testing.assert_array_equal(
        quantized_matmul(codes, weight, implementation="bfloat16"),
        quantized_matmul(codes, weight, implementation="xla"),
    )
    asymmetric = quantize(x, Quantizer(8, symmetric=False, granularity="token"), jnp.int8)
    with pytest.raises(UserError, match="zero points"):
        quantized_matmul(asymmetric, weight, implementation="bfloat16")


def test_refused_where_there_is_no_tpu():
    x, weight, *_ = make()
    with pytest.raises(UserError, match="the program is for cpu"):
        quantized_linear(x, weight, TOKEN, implementation="pallas_tpu")
    assert quantized_linear_choice(x, weight, TOKEN).implementation == "xla"


@pytest.mark.tpu_compile
def test_what_the_kernel_refuses_for_a_tpu():
    x, weight, _, gate, _ = make()
    narrow = QTensor(weight.codes[:, :200], weight.scale, None, 8)
    cases = (
        (x.astype(jnp.float16), weight, TOKEN, None, "float16"),
        (x, weight, Quantizer(8, symmetric=False, granularity="token", dynamic=True), None, "symmetric range"),
        (x, weight, Quantizer(8, granularity="tensor", dynamic=True), None, "a token"),
        (x, QTensor(weight.codes, weight.scale, weight.scale, 8), TOKEN, None, "zero points"),
        (x[..., :200], narrow, TOKEN, None, "multiples of 128"),
        (x, weight, TOKEN, gate[0], "gate"),
    )
    with jax.set_mesh(topology_mesh("v5e:1x1")):
        assert quantized_linear_choice(x, weight, TOKEN, asked="pallas_tpu").implementation == "pallas_tpu"
        for *arrays, given, why in cases:
            choice = quantized_linear_choice(*arrays, gate=given)
            assert choice.implementation == "xla"
            assert why in dict(choice.refused)["pallas_tpu"]
    with jax.set_mesh(topology_mesh("v5e:2x4")):
        assert "split" in dict(quantized_linear_choice(x, weight, TOKEN).refused)["pallas_tpu"]
    with jax.set_mesh(topology_mesh("tpu7x:2x2x1")):
        choice = quantized_linear_choice(x, weight, TOKEN)
        assert choice.implementation == "bfloat16"
        assert "emulated" in choice.reason
        assert "no products of integers" in dict(choice.refused)["pallas_tpu"]
    _, eighth, *_ = make(codebook=FLOAT8.codebook)
    for name, given, why in (
        ("v5e:1x1", (eighth, FLOAT8), "no products of float8"), ("v5e:1x1", (eighth, TOKEN), "the other float8"),
        ("tpu7x:2x2x1", (eighth, FLOAT8), "split"),
    ):  # fmt: skip
        with jax.set_mesh(topology_mesh(name)):
            assert why in dict(quantized_linear_choice(x, *given).refused)["pallas_tpu"]


def test_a_mesh_of_one_device_is_no_hindrance_elsewhere():
    x, weight, *_ = make()
    with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
        assert quantized_linear_choice(x, weight, TOKEN).implementation == "xla"


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", ["v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1"])
def test_compiles_at_real_shapes(name):
    """Both layers of a feed-forward of Wan 14B at 480p, gate and residual behind the second, and groups; float8 where
    it is the fast type."""
    mesh, activation = topology_mesh(name), TOKEN
    cases = ((5120, 13824, 8, 1, False), (13824, 5120, 4, 1, True), (5120, 13824, 4, 40, False))
    if name.startswith("tpu7x"):  # a chip is two devices, and the kernel is for one
        mesh, activation = topology_mesh(name, {"context": 1}), FLOAT8
        cases = ((5120, 13824, 8, 1, False), (13824, 5120, 8, 1, True))
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P()))  # noqa: E731
    for inputs, outputs, bits, groups, gated in cases:
        codes = array(jnp.int4 if bits == 4 else jnp.int8, outputs, inputs)
        weight = QTensor(codes, array(jnp.float32, outputs, groups), None, bits, activation.codebook)
        extra = (array(jnp.float32, outputs),)
        if gated:
            extra += (array(jnp.float32, 1, 1, outputs), array(jnp.bfloat16, 1, 32760, outputs))

        def layer(x, weight, bias, gate=None, residual=None):
            return quantized_linear(
                x, weight, activation, bias=bias, gate=gate, residual=residual, implementation="pallas_tpu"
            )

        report = plan(layer, array(jnp.bfloat16, 1, 32760, inputs), weight, *extra, mesh=mesh)
        assert report["fits"]
        # No codes of the input, no int32: at most the padded scales of the weight's groups.
        assert report["temporary_bytes"] < 16 * 2**20
