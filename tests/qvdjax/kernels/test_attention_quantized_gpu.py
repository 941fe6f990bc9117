"""The flash kernel for Hopper: in jax's interpreter what the plain reference gives, and lowered for CUDA.

The interpreter runs every warpgroup in a thread of XLA's, which has one a device: the tests' eight are enough.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.kernels import quantized_attention, quantized_attention_choice
from qvdjax.kernels.attention_quantized_gpu import KEYS, hopper_quantized, hopper_refusal
from qvdjax.kernels.dispatch import Device

H200 = Device("gpu", "NVIDIA H200")
kernel = functools.partial(hopper_quantized, interpret=True)
reference = functools.partial(quantized_attention, implementation="simulate", pv_block=KEYS)


def inputs(queries=150, keys=300, heads=2, head_dim=40, batch=1, dtype=jnp.float32):
    """Of Student's t distribution with 4 degrees of freedom: some channels are far out."""
    shapes = ((batch, queries, heads, head_dim), (batch, keys, heads, head_dim), (batch, keys, heads, head_dim))
    return [jax.random.t(jax.random.key(i), 4, shape).astype(dtype) for i, shape in enumerate(shapes)]


def assert_near(got, plain, pv_bits):
    # Scores differ in their last bit, which moves a probability at the edge of two codes by one code, of values of
    # about 8 among the probabilities of a row, whose largest may hold all of it.
    np.testing.assert_allclose(got, plain, atol=8 / (2**pv_bits - 1))
    assert np.abs(np.asarray(got) - plain).mean() < 1e-4


@pytest.mark.parametrize(
    ("qk_bits", "pv_bits", "heads", "options", "lengths"),
    [
        (8, 8, 2, {}, None),  # 150 queries in blocks of 128 and 300 keys, both ragged
        (4, 6, 1, {"key_block": 2 * KEYS, "smooth_key": False}, [290]),
    ],
)
def test_equals_the_reference(qk_bits, pv_bits, heads, options, lengths):
    arrays, lengths = inputs(heads=heads), None if lengths is None else jnp.asarray(lengths, jnp.int32)
    given = {"qk_bits": qk_bits, "pv_bits": pv_bits, **options}
    assert_near(kernel(*arrays, lengths, **given), reference(*arrays, lengths, **given), pv_bits)


def test_more_blocks_than_shared_memory_holds_and_samples_of_other_lengths():
    """Five blocks of keys go through three places; of the second sample only the first of them counts."""
    arrays, lengths = inputs(64, 600, 1, 64, batch=2), jnp.asarray([600, 70], jnp.int32)
    given = {"qk_bits": 8, "pv_bits": 8}
    assert_near(kernel(*arrays, lengths, **given), reference(*arrays, lengths, **given), 8)


def test_scales_zero_rows_and_nan_come_through():
    query, key, value = inputs(128, 128, 1, 128)
    query = query.at[0, 3].set(0).at[0, 5, 0, 7].set(jnp.nan)
    value = value.at[0, :, 0, 9].set(jnp.nan).at[0, :, 0, 11].set(0) * 1e20
    got = np.asarray(kernel(query, key * 1e-6, value, qk_bits=8, pv_bits=8))[0, :, 0]
    plain = np.asarray(reference(query, key * 1e-6, value, qk_bits=8, pv_bits=8))[0, :, 0]
    expected = np.zeros(got.shape, bool)
    expected[5], expected[:, 9] = True, True
    np.testing.assert_array_equal(np.isnan(got), expected)
    np.testing.assert_array_equal(np.isnan(plain), expected)
    others = ~expected
    # Keys are so small that all probabilities are alike: means of 128 values, which the order of a sum moves by little.
    np.testing.assert_allclose(got[others] / 1e20, plain[others] / 1e20, atol=1e-5)
    assert not got[np.arange(128) != 5, 11].any()


@pytest.mark.parametrize("head_dim", [64, 72, 128])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_it_is_lowered_for_cuda(head_dim, dtype):
    """Layouts, swizzles and what the tensor cores take are checked on the way; the last compiler needs a GPU."""
    array = jax.ShapeDtypeStruct((2, 300, 3, head_dim), dtype)
    run = jax.jit(functools.partial(hopper_quantized, qk_bits=8, pv_bits=8))
    exported = jax.export.export(run, platforms=["cuda"])(array, array, array, jax.ShapeDtypeStruct((2,), jnp.int32))
    assert exported.out_avals == (jax.core.ShapedArray((2, 300, 3, head_dim), dtype),)
    assert "mosaic_gpu" in exported.mlir_module()


def test_what_it_cannot_take_is_said():
    given = {"qk_bits": 8, "pv_bits": 8, "codebook": None, "key_block": None, "pv_block": 512}
    refusal = functools.partial(hopper_refusal, (1, 64, 2, 64), jnp.bfloat16, H200)
    assert refusal(**given) is None
    for change, reason in (
        ({"pv_bits": None}, "one is of floats"), ({"codebook": "float8_e4m3fn"}, "not of float8_e4m3fn"),
        ({"key_block": 96}, "96 keys share a range"), ({"pv_block": 64}, "over 64 keys"),
    ):  # fmt: skip
        assert reason in refusal(**{**given, **change})
    assert "136 features" in hopper_refusal((1, 64, 2, 136), jnp.bfloat16, H200, **given)
    assert "float64" in hopper_refusal((1, 64, 2, 64), jnp.float64, H200, **given)
    assert "for Hopper" in hopper_refusal((1, 64, 2, 64), jnp.bfloat16, Device("gpu", "NVIDIA B200"), **given)


def test_it_is_asked_for_by_name_and_refused_elsewhere():
    query, key, _ = inputs(8, 8)
    choice = quantized_attention_choice(query, key, qk_bits=8, pv_bits=8, pv_block=512)
    assert dict(choice.refused)["mosaic_gpu"].startswith("the program is for")
    with pytest.raises(UserError, match="mosaic_gpu cannot be run"):
        quantized_attention_choice(query, key, qk_bits=8, pv_bits=8, asked="mosaic_gpu")


def test_it_is_chosen_by_name_alone_on_hopper(monkeypatch):
    module = importlib.import_module("qvdjax.kernels.quantized_attention")  # its function has the same name
    monkeypatch.setattr(module, "target", lambda: H200)
    query, key, _ = inputs(8, 8)
    choose = functools.partial(quantized_attention_choice, query, key, qk_bits=8, pv_bits=8, pv_block=512)
    assert choose().implementation == "xla"
    assert choose(asked="mosaic_gpu").implementation == "mosaic_gpu"
