"""Codes that are floating-point numbers: their rounding, products of them, models, folders and exports."""

import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small_models
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from small_models import wan, wan_inputs

import conversion
import models
import qvdjax
from conversion.stored_layers import stored_layers
from qvdjax.checkpoint import CheckpointFolder, SafetensorsFile
from qvdjax.errors import UserError
from qvdjax.kernels import quantized_linear, quantized_matmul, quantized_matmul_choice
from qvdjax.numerics import Grid, QTensor, Quantizer, encode, fake_quantize, quantize
from qvdjax.numerics.float8 import FLOAT8, as_float8, decode_float8, encode_float8
from qvdjax.parallel import plan, topology_mesh
from qvdjax.ptq import set_execution
from qvdjax.recipes import get

TOKENS = Quantizer(8, granularity="token", dynamic=True, codebook=FLOAT8)
CHANNELS = Quantizer(8, codebook=FLOAT8)


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=40))
def test_the_nearest_number_is_taken(values):
    x = np.array(values, np.float32)
    codes = np.asarray(encode_float8(jnp.asarray(x)))
    # ml_dtypes rounds in one go, half to even; beyond 448 it would be NaN.
    expected = np.clip(x, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(as_float8(codes), expected)
    np.testing.assert_array_equal(np.asarray(decode_float8(jnp.asarray(codes, jnp.float32))), expected)


def test_halves_go_to_even_and_nan_stays():
    x = jnp.array([17.0, 19.0, 2.0**-10, 3 * 2.0**-10, jnp.nan, jnp.inf])  # between 16 | 18 | 20, and 0 | 2^-9 | 2^-8
    found = decode_float8(encode_float8(x)).astype(jnp.float32)
    np.testing.assert_array_equal(found, [16, 20, 0, 2.0**-8, jnp.nan, 448])


def test_invariants_of_a_qtensor_of_floats():
    x = jax.random.normal(jax.random.key(0), (3, 5, 32)).at[1, 2].set(0) * 7
    q = quantize(x, TOKENS)
    assert q.codes.dtype == jnp.int8
    assert (q.zero_point, q.scale.shape, q.operands.dtype) == (None, (3, 5, 1), jnp.float8_e4m3fn)
    assert bool(jnp.isfinite(q.scale).all() & (q.scale > 0).all())
    chex.assert_trees_all_close(q.dequantize().max(-1), jnp.where(x.max(-1) == jnp.abs(x).max(-1), x.max(-1),
                                q.dequantize().max(-1)), rtol=1e-6)  # the largest value is exact  # fmt: skip
    again = encode(q.dequantize(), q.grid, q.scale, None)
    chex.assert_trees_all_equal(again.codes, q.codes)
    assert not q.dequantize()[1, 2].any()
    # Half a step is a sixteenth of a number, and for the smallest 2^-10 of the scale.
    error = jnp.abs(q.dequantize() - x)
    assert bool((error <= jnp.maximum(jnp.abs(x) / 16, 2.0**-10 * q.scale) * (1 + 1e-6)).all())
    chex.assert_trees_all_close(fake_quantize(x, q.grid, q.scale), q.dequantize(), rtol=1e-6)
    assert bool(jnp.isnan(quantize(x.at[0, 0, 3].set(jnp.nan), TOKENS).dequantize()[0, 0]).all())


def test_gradients_pass_straight_through():
    x = jax.random.normal(jax.random.key(0), (2, 16))
    scale = TOKENS.scale_of(x)[0] / 2  # the largest values are beyond the largest number
    inside = jnp.abs(x / scale) <= 448
    assert 2 <= (~inside).sum() < x.size / 2
    gradient = jax.grad(lambda x: fake_quantize(x, TOKENS.grid, scale).sum())(x)
    chex.assert_trees_all_close(gradient, inside.astype(x.dtype), rtol=1e-5)


def test_products_are_of_float8():
    x, weight = (jax.random.normal(jax.random.key(key), shape) for key, shape in ((0, (3, 64)), (1, (7, 64))))
    left, right = quantize(x, TOKENS), quantize(weight, CHANNELS)
    exact = np.asarray(left.dequantize(), np.float64) @ np.asarray(right.dequantize(), np.float64).T
    for how in ("xla", "bfloat16", "simulate"):
        found = quantized_matmul(left, right, implementation=how)
        # Products are exact in float32, and sums of 64 of them near 1 round.
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-5)
    text = jax.jit(lambda a, b: quantized_matmul(a, b, implementation="xla")).lower(left, right).as_text()
    assert "(tensor<3x64xf8E4M3FN>, tensor<7x64xf8E4M3FN>) -> tensor<3x7xf32>" in text
    choice = quantized_matmul_choice(left, right)
    assert (choice.implementation, choice.reason) == ("xla", "cpu multiplies float8 into float32")
    integers = quantize(weight, Quantizer(8))
    mixed = quantized_matmul_choice(left, integers)
    assert (mixed.implementation, mixed.reason) == ("simulate", "one side is integers, the other float8")
    np.testing.assert_allclose(
        quantized_matmul(left, integers), left.dequantize() @ integers.dequantize().T, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(UserError, match="xla cannot be run: one side is integers, the other float8"):
        quantized_matmul(left, integers, implementation="xla")
    grouped = quantize(weight, Quantizer(8, granularity="group", group_size=16, codebook=FLOAT8))
    assert quantized_matmul_choice(left, grouped).implementation == "simulate"


@pytest.mark.slow
@pytest.mark.tpu_compile
@pytest.mark.parametrize(("name", "implementation"), [("tpu7x:2x2x1", "xla"), ("v5e:1x1", "bfloat16")])
def test_chips_multiply_float8_where_they_can(name, implementation):
    mesh = topology_mesh(name, {"data": -1})
    whole = NamedSharding(mesh, PartitionSpec())
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=whole)  # noqa: E731
    weight = QTensor(array(jnp.int8, 512, 1024), array(jnp.float32, 512, 1), None, 8, FLOAT8)
    report = plan(lambda x, w: quantized_linear(x, w, TOKENS), array(jnp.bfloat16, 256, 1024), weight, mesh=mesh)
    with jax.set_mesh(mesh):
        choice = quantized_matmul_choice(QTensor(array(jnp.int8, 256, 1024), weight.scale, None, 8, FLOAT8), weight)
    assert choice.implementation == implementation
    # Where codes are multiplied as bfloat16 the compiler widens them within the product: what reaches it is float8.
    (product,) = report["products"]
    assert (product["left"], product["right"]) == ("f8e4m3fn", "f8e4m3fn")


def test_a_model_of_float8_is_an_ordinary_one(tmp_path):
    model, inputs = wan(), wan_inputs()
    run = jax.jit(lambda model, inputs: model(**inputs))
    quantized = qvdjax.quantize(model, "fp8-w8a8", execution="integer")
    simulated = set_execution(nnx.clone(quantized), "simulate")
    error = lambda a, b: float(jnp.square(a - b).sum() / jnp.square(b).sum())  # noqa: E731
    # Sums in another order flip a code of a thousand.
    assert error(run(simulated, inputs), run(quantized, inputs)) < 1e-4
    assert 1e-6 < error(run(quantized, inputs), run(model, inputs)) < 0.02
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    chex.assert_trees_all_equal(run(loaded, inputs), run(quantized, inputs))
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    assert "codes are float8_e4m3fn" in rows["blocks.0.attn1.to_q"]["reason"]
    # Rounding to 3 bits of mantissa leaves 31.5 dB of numbers evenly spread within their powers of two.
    ratios = [row["sqnr_db"] for row in rows.values() if row["activation_bits"] == 8]
    assert np.mean(ratios) == pytest.approx(31.5, abs=1)
    layer = stored_layers(CheckpointFolder.open(tmp_path / "model"))["blocks.1.ffn.net.2"]
    weight = np.asarray(model.stacks[0].block.ffn.net["2"].weight[...][1])
    assert np.square(layer.weight() - weight).sum() < 0.002 * np.square(weight).sum()
    attending = qvdjax.quantize(model, get("fp8-w8a8", attention_qk_bits=8, attention_pv_bits=8), execution="integer")
    models.save(attending, tmp_path / "attending")
    loaded = models.load(tmp_path / "attending", execution="integer")
    chex.assert_trees_all_equal(run(loaded, inputs), run(attending, inputs))
    assert 1e-6 < error(run(attending, inputs), run(quantized, inputs)) < 0.02
    floats = qvdjax.quantize(model, "fp8-w8a16")
    assert error(run(floats, inputs), run(model, inputs)) < error(run(quantized, inputs), run(model, inputs))


def test_it_is_exported_as_compressed_tensors_says_it(tmp_path):
    models.save(qvdjax.quantize(wan(), "fp8-w8a8"), tmp_path / "model")
    conversion.export(tmp_path / "model", tmp_path / "out", format="compressed-tensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    groups = [group for group in config["config_groups"].values() if group["input_activations"]]
    assert {group["format"] for group in groups} == {"float-quantized"}
    assert {(part["type"], part["num_bits"]) for g in groups for part in (g["weights"], g["input_activations"])} == {
        ("float", 8)
    }
    (file,) = (tmp_path / "out").glob("*.safetensors")
    stored, own = SafetensorsFile(file), stored_layers(CheckpointFolder.open(tmp_path / "model"))
    name = "blocks.0.attn1.to_q"
    weight = stored.read(f"{name}.weight")
    assert weight.dtype == ml_dtypes.float8_e4m3fn
    real = weight.astype(np.float32) * stored.read(f"{name}.weight_scale")
    np.testing.assert_array_equal(real, own[name].weight())


def test_what_is_not_here_is_refused():
    with pytest.raises(ValueError, match="float8_e4m3fn has 8 bits, not 4"):
        Grid(4, codebook=FLOAT8)
    for name in ("fp8-w4a8", "fp8-w8a6"):
        with pytest.raises(UserError, match="float8_e4m3fn has 8 bits"):
            get(name)
    with pytest.raises(UserError, match="grids of a trained method are even"):
        get("lsq-w8a8", codebook=FLOAT8)
    unet = qvdjax.quantize(small_models.randomised(small_models.ResnetUNet()), "fp8-w8a8")
    reasons = {row["role"]: row["reason"] for row in qvdjax.describe(unet)}
    assert reasons["convolution"] == "no convolution of float8_e4m3fn is here"
