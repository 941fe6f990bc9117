"""Attention received by tokens: the sum of a softmax's columns, in any number of blocks, without padding."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from small_models import cogvideox, cogvideox_inputs, hunyuanvideo, hunyuanvideo_inputs, wan, wan_inputs

from qvdjax.calibration.attention_received import attention_received, block_attention
from qvdjax.parallel import topology_mesh


def written_out(query, key, lengths=None):
    """The definition, in float64 and with all scores at once."""
    query, key = np.asarray(query, np.float64), np.asarray(key, np.float64)
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(query.shape[-1])
    if lengths is not None:
        scores = np.where(np.arange(key.shape[1]) < np.asarray(lengths)[:, None, None, None], scores, -np.inf)
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    if lengths is not None and query.shape[1] == key.shape[1]:
        probabilities *= (np.arange(query.shape[1]) < np.asarray(lengths)[:, None])[:, None, :, None]
    return probabilities.sum(axis=(1, 2))


@hypothesis.given(
    queries=st.integers(1, 17), keys=st.integers(1, 13), maximum=st.integers(1, 400), padded=st.booleans(),
    same=st.booleans(),
)  # fmt: skip
@hypothesis.settings(max_examples=15)
def test_it_is_the_sum_of_the_columns_in_any_blocks(queries, keys, maximum, padded, same):
    keys = queries if same else keys
    random = np.random.default_rng(queries * 20 + keys)
    query, key = (random.standard_normal((2, n, 3, 4)).astype(np.float32) * 2 for n in (queries, keys))
    lengths = jnp.array([1, keys]) if padded else None
    found = attention_received(query, key, lengths, maximum_scores=maximum)
    # Float32 sums of at most 51 probabilities.
    np.testing.assert_allclose(found, written_out(query, key, lengths), rtol=1e-4, atol=1e-5)
    if not padded:
        np.testing.assert_allclose(found.sum(axis=1), 3 * queries, rtol=1e-5)


def test_memory_does_not_grow_with_the_square_of_tokens():
    def temporaries(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 4, 64), jnp.bfloat16)
        compiled = jax.jit(lambda q, k: attention_received(q, k, maximum_scores=2**18)).lower(shape, shape).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # Four times the tokens, sixteen times the scores; queries and keys, which are copied, take four times as much.
    assert temporaries(8192) < 4.5 * temporaries(2048)
    assert temporaries(8192) < 8192**2 * 4


@pytest.mark.slow
@pytest.mark.tpu_compile
def test_memory_is_linear_in_tokens_on_a_tpu():
    """Wan 1.3B's heads at the tokens of 81 frames of 480p, and at half of them; compiled for one chip, not run."""
    mesh = topology_mesh("v5e:1x1")

    def temporaries(tokens):
        where = NamedSharding(mesh, PartitionSpec())
        shape = jax.ShapeDtypeStruct((1, tokens, 12, 128), jnp.bfloat16, sharding=where)
        return jax.jit(attention_received).lower(shape, shape).compile().memory_analysis().temp_size_in_bytes

    half, whole = temporaries(16380), temporaries(32760)
    # 307 and 556 MiB: copies of queries and keys, and blocks of scores of one size. All scores of a head are 4 GiB.
    assert whole < 2.05 * half
    assert whole < 32760**2 * 4 / 5


@pytest.mark.parametrize(
    ("make", "inputs"), [(wan, wan_inputs), (cogvideox, cogvideox_inputs), (hunyuanvideo, hunyuanvideo_inputs)]
)
def test_a_block_computes_the_same_and_every_token_gets_its_share(make, inputs):
    model, given = make(), inputs()
    stream, conditioning = jax.jit(lambda m, i: m.embed(**i))(model, given)
    heads = model.config.num_attention_heads
    for stack in model.stacks:
        block = jax.tree.map(lambda a: a[0], stack.block)
        before = jax.tree.structure(block)
        out, received = jax.jit(block_attention)(block, stream, conditioning)
        chex.assert_trees_all_close(
            out, jax.jit(lambda b, *a: b(*a))(block, stream, conditioning), rtol=1e-5, atol=1e-5
        )
        assert jax.tree.structure(block) == before  # left as it is
        lengths = getattr(conditioning, "key_lengths", None)
        counted = jnp.full(len(stream), stream.shape[1]) if lengths is None else lengths
        # All that queries give away is what keys get; padding neither gives nor gets.
        np.testing.assert_allclose(received.sum(axis=1), heads * counted, rtol=1e-4)
        np.testing.assert_array_equal(np.asarray(received > 0).sum(axis=1), counted)
        assert nnx.state(block, nnx.Param)  # parameters are still its own


def test_keys_of_the_text_are_not_counted():
    """Wan's cross-attention has other keys: what video tokens get is that of self-attention alone."""
    model, given = wan(), wan_inputs()
    stream, conditioning = model.embed(**given)
    block = jax.tree.map(lambda a: a[0], model.stacks[0].block)
    _, received = block_attention(block, stream, conditioning)
    assert received.shape == stream.shape[:2]
    block.attn2.to_k.weight[...] = 10 * block.attn2.to_k.weight[...]
    chex.assert_trees_all_close(block_attention(block, stream, conditioning)[1], received, rtol=1e-6)
