"""Scaled dot-product attention of floats: one function, and what it may be computed by."""

import math

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qvdjax.kernels.attention_splash import BLOCK, splash_attention, splash_refusal
from qvdjax.kernels.dispatch import Choice, Device, Implementation, Option, choose, target

# Scores of more elements than this are made one block of queries after the other (1 GiB of float32).
MAXIMUM_SCORES = 2**28
# Bytes of float32 scores that are too many to be written to memory and read again.
LARGE_SCORES = 2**26


def dot_product_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *,
    implementation: Implementation | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v; scores and softmax are at least float32.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, heads, head_dim].
        key_lengths: [batch] whole numbers of at least 1: so many keys of each sample count, from the first. None: all.
        implementation: None for what `attention_choice` says, or by name:
            "xla": batched products; blocks of queries where the scores would be too large. The reference.
            "mapped": one head of one sample after the other, recomputed in the backward pass. Scores then stay in the
                cache of a CPU, where this is 5 to 10 times as fast; elsewhere it is slow.
            "cudnn": cuDNN's flash attention, for half-precision arrays on a GPU and heads of at most 128 features.
            "pallas_tpu": jax's splash kernel, for heads of 128 features or a multiple; under a mesh every device takes
                its own heads (see `splash_attention`).

    Returns:
        Like query.

    Raises:
        UserError: An implementation that is not there or cannot take the arrays.
    """
    chosen = attention_choice(query, key, implementation).implementation
    if chosen == "cudnn":
        lengths = None if key_lengths is None else key_lengths.astype(jnp.int32)
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    if chosen == "pallas_tpu":
        return splash_attention(query, key, value, key_lengths)
    if chosen == "mapped":
        return _mapped(query, key, value, key_lengths)

    def attend(query):
        product = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=_wide(query))
        scores = mask_uncounted(scaled(query, product), key_lengths)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", probabilities, value).astype(query.dtype)

    return by_query_blocks(attend, query, key.shape[1])


def attention_choice(query: jax.Array, key: jax.Array, asked: Implementation | None = None) -> Choice:
    """What computes `dot_product_attention` of such arrays on the device that the program is for, and why.

    Raises `UserError` as `choose` does. Shapes as in `dot_product_attention`; no values are looked at.
    """
    device = target()
    return choose("attention", _options(query, key, device), asked)


def _options(query, key, device: Device) -> list[Option]:
    elsewhere = f"the program is for {device.kind}"
    tpu = splash_refusal(query) if device.platform == "tpu" else elsewhere
    gpu = _cudnn_refusal(query) if device.platform == "gpu" else elsewhere
    # Few keys (a text's tokens) would be padded to a block, which pays where their scores are large all the same.
    batch, queries, heads, _ = query.shape
    large = 4 * batch * queries * heads * key.shape[1] > LARGE_SCORES
    many = f"scores of {key.shape[1]} keys stay in the chip" if key.shape[1] > BLOCK or large else None
    # A mesh may describe other devices than this process has, and "mapped" would gather a sharded batch.
    alone = device.platform == "cpu" and jax.sharding.get_abstract_mesh().empty
    return [
        Option("pallas_tpu", tpu, many),
        Option("cudnn", gpu, "scores stay in the chip"),
        Option("mapped", None, "scores of one head stay in the cache of a CPU" if alone else None),
        Option("xla", None, "takes everything, and nothing better takes these arrays here"),
        Option("mosaic_gpu", "no such kernel was written for float attention: cuDNN's is the rival to beat"),
    ]


def _cudnn_refusal(query) -> str | None:
    """What cuDNN does not take on every GPU that has it; Hopper and later would take heads of 256 features."""
    if query.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it takes bfloat16 and float16, not {query.dtype}"
    if query.shape[-1] > 128 or query.shape[-1] % 8:
        return f"heads of {query.shape[-1]} features are more than 128 or no multiple of 8"
    return None


def _mapped(query, key, value, key_lengths):
    @jax.checkpoint
    def one_head(arrays):  # [queries, head_dim], [keys, head_dim] twice, [1] or None
        q, k, v, length = arrays
        product = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=_wide(q))
        scores = mask_uncounted(scaled(q, product), length)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    batch, _, heads, _ = query.shape
    arrays = (rearrange(a, "b t h d -> (b h) t d") for a in (query, key, value))
    lengths = None if key_lengths is None else repeat(key_lengths, "b -> (b h) 1", h=heads)
    heads = jax.lax.map(one_head, (*arrays, lengths))
    return rearrange(heads, "(b h) t d -> b t h d", b=batch).astype(query.dtype)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def scaled(query: jax.Array, product: jax.Array) -> jax.Array:
    """Scores from the product of queries [..., head_dim] and keys."""
    return product * (1 / math.sqrt(query.shape[-1]))


def mask_uncounted(scores: jax.Array, key_lengths: jax.Array | None) -> jax.Array:
    """Scores [batch, ..., keys] whose keys beyond `key_lengths` [batch] are so low that they get no probability."""
    if key_lengths is None:
        return scores
    lengths = key_lengths.reshape(-1, *(1,) * (scores.ndim - 1))  # [batch] -> [batch, 1, ..., 1]
    return jnp.where(jnp.arange(scores.shape[-1]) < lengths, scores, jnp.finfo(scores.dtype).min)


def by_query_blocks(attend, query: jax.Array, keys: int) -> jax.Array:
    """Apply `attend` to all queries [batch, queries, heads, head_dim] at once, or block after block where the scores
    would be too large."""
    batch, queries, heads, _ = query.shape
    if batch * heads * queries * keys <= MAXIMUM_SCORES:
        return attend(query)
    block = max(128, MAXIMUM_SCORES // (batch * heads * keys) // 128 * 128)
    blocks = -(-queries // block)
    padded = jnp.pad(query, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    # Recomputed in the backward pass, which would otherwise keep the scores of all blocks.
    out = jax.lax.map(jax.checkpoint(attend), rearrange(padded, "b (blocks q) h d -> blocks b q h d", blocks=blocks))
    return rearrange(out, "blocks b q h d -> b (blocks q) h d")[:, :queries]
