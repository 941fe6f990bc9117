"""Attention: its implementations agree, and quantized products are what they should be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.kernels import attention_choice
from qvdjax.nn import AttentionScheme, dot_product_attention, quantized_attention


def qkv(queries=9, keys=13, heads=3, width=8, dtype=jnp.float32):
    make = lambda i, t: jax.random.normal(jax.random.key(i), (2, t, heads, width), dtype)  # noqa: E731
    return make(0, queries), make(1, keys), make(2, keys)


def textbook(query, key, value):
    query, key, value = (np.asarray(a, np.float64) for a in (query, key, value))
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), value)


@pytest.mark.parametrize("implementation", [None, "xla", "mapped"])
def test_dot_product_attention(implementation):
    arrays = qkv()
    out = dot_product_attention(*arrays, implementation=implementation)
    chex.assert_trees_all_close(np.asarray(out, np.float64), textbook(*arrays), atol=1e-6)  # float32 averages near 1


def test_blocks_of_queries_change_nothing(monkeypatch):
    arrays = qkv(queries=300, keys=40)
    whole = dot_product_attention(*arrays, implementation="xla")
    monkeypatch.setattr("qvdjax.kernels.attention.MAXIMUM_SCORES", 2 * 3 * 40 * 130)  # 300 queries in 3 blocks of 128
    blocked = dot_product_attention(*arrays, implementation="xla")
    chex.assert_trees_all_close(blocked, whole, atol=1e-6)
    scheme = AttentionScheme(8, 8)
    blocked = quantized_attention(*arrays, scheme=scheme, execution="integer")
    monkeypatch.undo()
    whole = quantized_attention(*arrays, scheme=scheme, execution="integer")
    # A score's last bit may flip one code of a probability, 1 / 255 of a value.
    chex.assert_trees_all_close(blocked, whole, atol=3 / 255)
    assert float(jnp.abs(blocked - whole).mean()) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_gradients(implementation):
    arrays = qkv()
    loss = lambda *a: (dot_product_attention(*a, implementation=implementation) ** 2).sum()  # noqa: E731
    gradients, direction = jax.grad(loss, (0, 1, 2))(*arrays), qkv()[::-1]
    direction = [jax.random.normal(jax.random.key(i), a.shape) for i, a in enumerate(arrays)]
    step = 1e-2
    moved = [loss(*(a + s * step * d for a, d in zip(arrays, direction, strict=True))) for s in (1, -1)]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    # A central difference in float32: its error is the third derivative times step**2, about 1e-3 of the slope.
    np.testing.assert_allclose((moved[0] - moved[1]) / (2 * step), slope, rtol=2e-2)


@pytest.mark.parametrize("scheme", [AttentionScheme(8), AttentionScheme(None, 8), AttentionScheme(8, 8),
                                    AttentionScheme(4, 6), AttentionScheme(8, 8, smooth_key=False),
                                    AttentionScheme(8, 8, key_block=4, pv_block=5),
                                    AttentionScheme(8, 8, codebook="float8_e4m3fn")])  # fmt: skip
def test_integer_and_simulated_execution_agree(scheme):
    arrays = qkv()
    integer, simulated = (quantized_attention(*arrays, scheme=scheme, execution=e) for e in ("integer", "simulate"))
    # Scores differ by float32 rounding, so a probability at the edge of two codes may take either: one code of 255
    # (or of 63) of one value out of 13 keys.
    # Of float8 it is an eighth of the value.
    codes = 8 if scheme.codebook else 2 ** (scheme.pv_bits or 1) - 1
    allowed = 1e-5 if scheme.pv_bits is None else 3 / codes
    chex.assert_trees_all_close(integer, simulated, atol=allowed)
    assert float(jnp.mean(jnp.abs(integer - simulated))) < 1e-3


def test_eight_bits_are_near_lossless():
    arrays = qkv(queries=64, keys=64, width=32)
    exact = textbook(*arrays)
    # Two 8-bit operands a product: about 2**-8 each; of float8, whose mantissa has three bits, about 2**-5.
    float8 = AttentionScheme(8, 8, codebook="float8_e4m3fn")
    for scheme, allowed in ((AttentionScheme(8), 0.01), (AttentionScheme(8, 8), 0.02), (float8, 0.08)):
        error = np.linalg.norm(quantized_attention(*arrays, scheme=scheme, execution="integer") - exact)
        assert error / np.linalg.norm(exact) < allowed


def test_smoothing_keys_saves_a_large_offset():
    query, key, value = qkv(queries=64, keys=64, width=32)
    key = key + 50 * jax.random.normal(jax.random.key(9), (1, 1, 3, 32))
    exact = textbook(query, key, value)
    error = lambda s: np.linalg.norm(quantized_attention(query, key, value, scheme=s, execution="integer") - exact)  # noqa: E731
    assert error(AttentionScheme(8)) < 0.2 * error(AttentionScheme(8, smooth_key=False))


def test_one_block_of_all_keys_is_a_range_a_query():
    arrays = qkv()
    attend = lambda block: quantized_attention(  # noqa: E731
        *arrays, scheme=AttentionScheme(8, 8, pv_block=block), execution="integer"
    )
    np.testing.assert_array_equal(attend(None), attend(512))


def test_blocks_save_probabilities_far_below_the_largest():
    """One key that all queries look at, and many that share a third: with one range for all, these round to zero."""
    query, key, value = qkv(queries=16, keys=512, width=32)
    # Of the others' scores, all zero, each probability is e^-7 of the largest: 0.23 of a step of 1 / 255.
    query, key = jnp.zeros_like(query).at[..., 0].set(1.0), key.at[..., 0].set(0.0).at[:, 7, :, 0].set(7 * 32**0.5)
    exact = textbook(query, key, value)

    def error(block):
        scheme = AttentionScheme(None, 8, pv_block=block)
        got = quantized_attention(query, key, value, scheme=scheme, execution="integer")
        return np.linalg.norm(got - exact) / np.linalg.norm(exact)

    assert error(None) > 0.2
    assert error(32) < 0.1  # only the 31 keys beside that one are lost


def test_nan_comes_through():
    query, key, value = qkv()
    attend = lambda *a: quantized_attention(*a, scheme=AttentionScheme(8, 8), execution="integer")  # noqa: E731
    spoilt = np.isnan(attend(query.at[0, 3, 1, 2].set(jnp.nan), key, value))
    assert spoilt[0, 3, 1].all()
    assert spoilt.sum() == query.shape[-1]
    assert np.isnan(attend(query, key.at[0, 3, 1, 2].set(jnp.nan), value))[0, :, 1].all()
    assert np.isnan(attend(query, key, value.at[0, 3, 1, 2].set(jnp.nan)))[0, :, 1, 2].all()


LENGTHS = jnp.asarray([5, 13])  # of 13 keys


def without_padding(attend, query, key, value, lengths):
    """Each sample alone, with so many keys."""
    return jnp.concatenate([
        attend(query[i : i + 1], key[i : i + 1, :length], value[i : i + 1, :length])
        for i, length in enumerate(lengths.tolist())
    ])  # fmt: skip


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_keys_beyond_the_length_are_as_if_not_there(implementation):
    query, key, value = qkv()
    attend = lambda *a: dot_product_attention(*a, implementation=implementation)  # noqa: E731
    out = attend(query, key, value, LENGTHS)
    # Probabilities of 0 add nothing; sums of 13 instead of 5 numbers may be taken in another order.
    chex.assert_trees_all_close(out, without_padding(attend, query, key, value, LENGTHS), atol=1e-6)
    spoilt = key.at[0, 5:].set(100.0), value.at[0, 5:].set(-1e4)
    assert (attend(query, *spoilt, LENGTHS) == out).all()


@pytest.mark.parametrize("implementation", ["xla", "mapped"])
def test_keys_beyond_the_length_get_no_gradient(implementation):
    query, key, value = qkv()
    loss = lambda k, v: (dot_product_attention(query, k, v, LENGTHS, implementation=implementation) ** 2).sum()  # noqa: E731
    for gradient in jax.grad(loss, (0, 1))(key, value):
        assert (gradient[0, 5:] == 0).all()
        assert bool(jnp.isfinite(gradient).all())
        assert float(jnp.abs(gradient[0, :5]).min()) > 0


def test_lengths_and_blocks_of_queries(monkeypatch):
    arrays = qkv(queries=300, keys=13)
    whole = dot_product_attention(*arrays, LENGTHS, implementation="xla")
    monkeypatch.setattr("qvdjax.kernels.attention.MAXIMUM_SCORES", 2 * 3 * 13 * 130)  # 300 queries in 3 blocks of 128
    chex.assert_trees_all_close(dot_product_attention(*arrays, LENGTHS, implementation="xla"), whole, atol=1e-6)


@pytest.mark.parametrize("scheme", [AttentionScheme(8, 8), AttentionScheme(None, 6), AttentionScheme(4, 6)])
@pytest.mark.parametrize("execution", ["integer", "simulate"])
def test_ranges_and_means_leave_padding_out(scheme, execution):
    query, key, value = qkv()
    attend = lambda *a: quantized_attention(*a, scheme=scheme, execution=execution)  # noqa: E731
    spoilt = key.at[0, 5:].set(100.0), value.at[0, 5:].set(-1e4)
    out = attend(query, *spoilt, LENGTHS)
    # The same codes, unless the last bit of a mean or score flips one: one code of 255 (or 63) of one value, or of 15
    # (4 bits) of a query or key.
    allowed = 3 / (2**scheme.pv_bits - 1) if scheme.qk_bits != 4 else 0.2
    plain = without_padding(attend, query, key, value, LENGTHS)
    chex.assert_trees_all_close(out, plain, atol=allowed)
    assert float(jnp.abs(out - plain).mean()) < 1e-3


def test_unknown_implementation():
    with pytest.raises(UserError, match="unknown"):
        dot_product_attention(*qkv(), implementation="magic")


@pytest.mark.parametrize(("width", "dtype", "best"), [
    (64, jnp.bfloat16, "cudnn"), (160, jnp.bfloat16, "xla"), (20, jnp.float16, "xla"), (64, jnp.float32, "xla"),
])  # fmt: skip
def test_cudnn_gets_only_heads_that_it_takes(monkeypatch, width, dtype, best):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    query, key, _ = qkv(width=width, dtype=dtype)
    assert attention_choice(query, key).implementation == best
