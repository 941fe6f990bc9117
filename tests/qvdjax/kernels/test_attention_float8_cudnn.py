"""cuDNN's float8 attention: what goes in and comes out, its product replaced; and it is lowered for CUDA."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_attention import distance, exact

from qvdjax.errors import UserError
from qvdjax.kernels import attention_float8_cudnn, quantized_attention, quantized_attention_choice
from qvdjax.kernels.attention_float8_cudnn import ONE, cudnn_float8, cudnn_refusal
from qvdjax.kernels.dispatch import Device
from qvdjax.numerics.float8 import FLOAT8

H200 = Device("gpu", "NVIDIA H200")
NEAR = 0.07  # see the first test


def inputs(queries=40, keys=72, heads=2, head_dim=32, batch=2, dtype=jnp.float32):
    shapes = ((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    return [jax.random.normal(jax.random.key(i), shape).astype(dtype) for i, shape in enumerate(shapes)]


@pytest.fixture
def without_a_gpu(monkeypatch):
    """The product as cuDNN's documentation has it: real = code x descale, code = real x scale, the softmax in float32;
    by its own rounding, beyond 448 NaN."""

    def product(q, k, v, scales, factor):
        assert {a.dtype for a in (q, k, v)} == {jnp.dtype(jnp.float8_e4m3fn)}
        q, k, v = (a.astype(jnp.float32) for a in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scales["descale_q"] * scales["descale_k"] * factor
        weights = jnp.exp(scores - scores.max(-1, keepdims=True))
        codes = (weights * scales["scale_s"]).astype(jnp.float8_e4m3fn).astype(jnp.float32)
        out = jnp.einsum("bhqk,bkhd->bqhd", codes, v) * scales["descale_s"] * scales["descale_v"]
        out = out / jnp.moveaxis(weights.sum(-1), 1, 2)[..., None]
        return (out * scales["scale_o"]).astype(jnp.float8_e4m3fn)

    monkeypatch.setattr(attention_float8_cudnn, "_product", product)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1e-3, 1e3, 1e-20), (1e4, 1e-4, 1e20)])
def test_near_the_truth_at_any_scale(without_a_gpu, sizes):
    arrays = [a * size for a, size in zip(inputs(), sizes)]
    # A rounding errs by 2.5 % of a number (a step of 1/8 over sqrt(12), for mantissas of about 1.44). Values,
    # probabilities and the result each give that; scores of order 1 err by that of two operands, and probabilities by
    # as much: sqrt(3 + 2) x 2.5 % = 5.6 %.
    assert distance(cudnn_float8(*arrays), exact(*arrays)) < NEAR


def test_keys_far_from_zero_keep_their_range_when_smoothed(without_a_gpu):
    query, key, value = inputs()
    key = key + 100
    error = lambda **how: distance(cudnn_float8(query, key, value, **how), exact(query, key, value))  # noqa: E731
    assert error() < NEAR
    # A step of float8 is 8 at 100: nothing is left of differences of 1.
    assert error(smooth_key=False) > 0.5


def test_a_result_as_large_as_the_largest_value_stays_finite(without_a_gpu):
    query, key, value = inputs()
    alike = jnp.full_like(value, 3.0).at[..., 1].set(-3.0)
    got = cudnn_float8(query, key, alike)
    # Rounded probabilities, and the result once more: 2^-4 each at most.
    np.testing.assert_allclose(got, np.broadcast_to(alike[:, :1], got.shape), rtol=0.13)


def test_zeros_stay_and_nan_comes_through(without_a_gpu):
    query, key, value = inputs()
    assert not np.asarray(cudnn_float8(query, key, 0 * value)).any()
    assert np.isfinite(np.asarray(cudnn_float8(0 * query, 0 * key, value))).all()
    for place in range(3):
        for bad in (jnp.nan, jnp.inf):
            arrays = [query, key, value]
            arrays[place] = arrays[place].at[0, 3, 1, 2].set(bad)
            assert np.isnan(np.asarray(cudnn_float8(*arrays))).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_is_lowered_for_cuda(monkeypatch, dtype):
    """jax's call is there and takes what it is given; whether cuDNN does, a GPU would say."""
    from jax._src.cudnn import fused_attention_stablehlo

    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    array = jax.ShapeDtypeStruct((2, 72, 3, 128), dtype)
    exported = jax.export.export(
        jax.jit(cudnn_float8), platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("__cudnn$fmhaSoftmaxF8")],
    )(array, array, array)  # fmt: skip
    assert exported.out_avals == (jax.core.ShapedArray((2, 72, 3, 128), dtype),)
    assert "__cudnn$fmhaSoftmaxF8" in exported.mlir_module()


def test_probabilities_leave_room_for_the_rounding_of_their_sum():
    assert ONE * (1 + 2**-4) < 448


def test_what_it_cannot_take_is_said():
    given = {"qk_bits": 8, "pv_bits": 8, "codebook": FLOAT8, "key_block": None, "pv_block": 512}
    refusal = functools.partial(cudnn_refusal, (1, 64, 2, 64), jnp.bfloat16, H200)
    assert refusal(**given) is None
    for change, reason in (
        ({"pv_bits": None}, "in both"), ({"codebook": None}, "of float8_e4m3fn alone"),
        ({"lengths": True}, "all keys count"),
    ):  # fmt: skip
        assert reason in refusal(**{**given, **change})
    assert "72 features" in cudnn_refusal((1, 64, 2, 72), jnp.bfloat16, H200, **given)
    assert "float64" in cudnn_refusal((1, 64, 2, 64), jnp.float64, H200, **given)
    assert "for Hopper" in cudnn_refusal((1, 64, 2, 64), jnp.bfloat16, Device("gpu", "NVIDIA A100"), **given)


def test_it_is_chosen_by_name_alone(monkeypatch, without_a_gpu):
    query, key, value = inputs()
    given = {"qk_bits": 8, "pv_bits": 8, "codebook": FLOAT8, "pv_block": 512}
    with pytest.raises(UserError, match="cudnn cannot be run"):
        quantized_attention(query, key, value, **given, implementation="cudnn")
    module = importlib.import_module("qvdjax.kernels.quantized_attention")  # its function has the same name
    monkeypatch.setattr(module, "target", lambda: H200)
    assert quantized_attention_choice(query, key, **given).implementation == "xla"
    got = quantized_attention(query, key, value, **given, implementation="cudnn")
    np.testing.assert_array_equal(got, cudnn_float8(query, key, value))
    lengths = jnp.asarray([5, 72], jnp.int32)
    with pytest.raises(UserError, match="all keys count there"):
        quantized_attention(query, key, value, lengths, **given, implementation="cudnn")
