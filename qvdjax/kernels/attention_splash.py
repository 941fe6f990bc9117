"""Flash attention on TPU: jax's splash kernel, heads split over the mesh in scope."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from qvdjax.parallel.rules import partition_spec

BLOCK = 512  # rows and columns of scores that are held at a time


def splash_suits(query: jax.Array, key: jax.Array) -> bool:
    """Whether the kernel takes arrays like these and saves something: shapes as in `splash_attention`.

    Fewer keys than a block holds (a text's tokens) would be padded to it, and their scores are small.
    """
    return query.shape[-1] % 128 == 0 and key.shape[1] > BLOCK and query.dtype in (jnp.bfloat16, jnp.float32)


def splash_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *, block: int = BLOCK,
    interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v over the keys that count; scores are never written to memory.

    Tokens are padded to whole blocks and the padding is kept apart by segment numbers. Under a mesh
    (`jax.set_mesh`) heads are split as the rule `attention_heads` says, so that every device holds all tokens
    of its heads: callers that keep tokens split pin query, key and value to tokens first, and XLA exchanges
    heads for tokens (all-to-all). Inside a caller's own `shard_map` the arrays are a device's own.

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
    mesh = jax.sharding.get_abstract_mesh()
    attend = functools.partial(_attend, block=block, interpret=interpret)
    arrays = (query, key, value) if key_lengths is None else (query, key, value, key_lengths)
    if AxisType.Auto not in mesh.axis_types:
        return attend(*arrays)
    axes = ("batch", None, "attention_heads", None)
    spec: PartitionSpec = partition_spec(query.shape, axes, mesh)[0]
    specs = (spec, spec, spec, PartitionSpec(spec[0]))[: len(arrays)]
    # The kernel says nothing about which outputs vary over which axes, so that check is off.
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _attend(query, key, value, key_lengths=None, *, block: int, interpret: bool):
    """On one device. All [batch, tokens, heads, head_dim], but for `key_lengths` [batch]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    queries, keys, heads = query.shape[1], key.shape[1], query.shape[2]
    # [batch, tokens, heads, head_dim] -> [batch, heads, whole blocks of tokens, head_dim]
    query = _blocks(query * (1 / math.sqrt(query.shape[-1])), block)
    key, value = _blocks(key, block), _blocks(value, block)
    everywhere = masks.FullMask((query.shape[2], key.shape[2]))
    sides = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([everywhere] * heads),
        block_sizes=kernels.BlockSizes(**dict.fromkeys(sides, block), block_q_dq=block, block_kv_dq=block),
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
