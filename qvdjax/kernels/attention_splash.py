"""Flash attention on TPU: jax's splash kernel, heads split over the mesh in scope."""

import functools
import math

import jax
import jax.numpy as jnp

from qvdjax.kernels.head_split import over_heads

BLOCK = 512  # rows and columns of scores that are held at a time


def splash_refusal(query: jax.Array) -> str | None:
    """Why the kernel cannot take a query [batch, queries, heads, head_dim]; None where it can."""
    if query.shape[-1] % 128:
        return f"heads of {query.shape[-1]} features are no multiple of 128"
    if query.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {query.dtype}"
    return None


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *, block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v over the keys that count; scores are never written to memory.

    Tokens are padded to whole blocks and the padding is kept apart by segment numbers. Under a mesh heads are split
    (`qvdjax.kernels.head_split`).

    Args:
        query: [batch, queries, heads, head_dim]; head_dim a multiple of 128.
        key, value: [batch, keys, heads, head_dim].
        key_lengths: [batch] whole numbers: so many keys of each sample count, from the first. None: all.
        block: Multiple of 128.
        interpret: Run the kernel's arithmetic on any device, slowly (for tests).

    Returns:
        Like query. Scores and softmax are float32.

    Raises:
        ValueError: A head_dim or block that the kernel cannot take.
    """
    if query.shape[-1] % 128 or block % 128:
        raise ValueError(f"splash takes multiples of 128: head_dim {query.shape[-1]}, block {block}")
    attend = functools.partial(_attend, block=block, interpret=interpret)
    return over_heads(attend, query, key, value, key_lengths)


def _attend(query, key, value, key_lengths=None, *, block: int, interpret: bool):
    """On one device. All [batch, tokens, heads, head_dim], but for `key_lengths` [batch]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    # Few keys are padded to whole registers, not to a whole block.
    columns = min(block, -(-keys // 128) * 128)
    # [batch, tokens, heads, head_dim] -> [batch, heads, whole blocks of tokens, head_dim]
    query = _blocks(query * (1 / math.sqrt(query.shape[-1])), block)
    key, value = _blocks(key, columns), _blocks(value, columns)
    everywhere = masks.FullMask((query.shape[2], key.shape[2]))
    of_queries = ("block_q", "block_q_dkv", "block_q_dq")
    of_keys = ("block_kv", "block_kv_compute", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([everywhere] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(of_queries, block), **dict.fromkeys(of_keys, columns)),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def one_sample(query, key, value, length):
        segments = kernels.SegmentIds(_is_padding(query.shape[1], queries), _is_padding(key.shape[1], length))
        return kernel(query, key, value, segment_ids=segments)

    lengths, along = (keys, None) if key_lengths is None else (key_lengths, 0)
    out = jax.vmap(one_sample, in_axes=(0, 0, 0, along))(query, key, value, lengths)
    return out.transpose(0, 2, 1, 3)[:, :queries].astype(query.dtype)  # [batch, tokens, heads, head_dim]


def _blocks(x, block):
    padding = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).transpose(0, 2, 1, 3)


def _is_padding(length: int, tokens: int | jax.Array) -> jax.Array:
    """Segment numbers [length]: 0 for tokens, 1 for padding, which attends to itself alone."""
    return (jnp.arange(length) >= tokens).astype(jnp.int32)
