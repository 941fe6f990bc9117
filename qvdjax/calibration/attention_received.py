"""How much attention each token gets, without ever holding all scores."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from qvdjax.kernels.attention import mask_uncounted
from qvdjax.nn import Attention, Statistic
from qvdjax.nn.variables import iterate, replace, shallow_copy
from qvdjax.parallel.rules import constrain

# Scores held at a time (256 MiB of float32, a block's queries by all keys), so that memory grows with the number of
# tokens and not with its square.
MAXIMUM_SCORES = 2**26


def attention_received(
    query: jax.Array, key: jax.Array, key_lengths: jax.Array | None = None, *, maximum_scores: int = MAXIMUM_SCORES
) -> jax.Array:
    """The sum over heads and queries of the attention that each key gets (S2Q-VDiT, arXiv 2508.04016, equation 11).

    Queries are gone through in blocks. A block's rows of scores are whole, so each is normalised in the first pass over
    it and added to the sum in the second; the sum of a softmax needs no third.

    Args:
        query: [batch, queries, heads, head_dim]. key: [batch, keys, heads, head_dim].
        key_lengths: [batch], as `Attention` takes them; keys that do not count get nothing. So do queries at these
            places where there are as many queries as keys: they are padding of the same stream.
        maximum_scores: At most so many scores are held at a time, or one query of each head and sample.

    Returns:
        [batch, keys], at least float32; over all keys that is heads x queries.
    """
    batch, queries, heads, _ = query.shape
    keys, wide = key.shape[1], jnp.promote_types(query.dtype, jnp.float32)
    block = min(queries, max(1, maximum_scores // (batch * heads * keys)))
    blocks = -(-queries // block)
    # Padded queries count nothing: their rows are multiplied by zero.
    counts = jnp.ones((batch, queries), wide)
    if key_lengths is not None and queries == keys:
        counts = (jnp.arange(keys) < key_lengths[:, None]).astype(wide)
    rest = blocks * block - queries
    query = jnp.pad(query, ((0, 0), (0, rest), (0, 0), (0, 0)))
    counts = jnp.pad(counts, ((0, 0), (0, rest)))
    key = key * query.shape[-1] ** -0.5

    def one_block(total, arrays):
        rows, row_counts = arrays  # [batch, block, heads, head_dim], [batch, block]
        scores = jnp.einsum("bqhd,bkhd->bhqk", rows, key, preferred_element_type=wide)
        scores = mask_uncounted(scores, key_lengths)
        normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)  # [batch, heads, block, 1]
        got = jnp.exp(scores - normaliser) * row_counts[:, None, :, None]
        return total + got.sum(axis=(1, 2)), None

    parts = rearrange(query, "b (n q) h d -> n b q h d", n=blocks), rearrange(counts, "b (n q) -> n b q", n=blocks)
    total, _ = jax.lax.scan(one_block, jnp.zeros((batch, keys), wide), parts)
    return total


class Receiving(nnx.Module):
    """An attention over its block's stream that keeps what each token got in its last call.

    Attributes:
        received: [batch, tokens] float32.
    """

    def __init__(self, attention: Attention, batch: int, tokens: int):
        self.attention = attention
        self.received = Statistic(jnp.zeros((batch, tokens), jnp.float32), axes=(None, None))

    def __call__(self, query, key, value, key_lengths=None) -> jax.Array:
        """As `Attention`."""
        whole = (constrain(a, "batch", None, "attention_heads", None) for a in (query, key))
        self.received[...] = attention_received(*whole, key_lengths).astype(jnp.float32)
        return self.attention(query, key, value, key_lengths)


def block_attention(block: nnx.Module, stream: jax.Array, conditioning) -> tuple[jax.Array, jax.Array]:
    """A block's output, and how much attention its tokens get in all its attentions over the stream together.

    Args:
        block: One float block.
        stream: (batch, tokens, width).
        conditioning: See `VideoModel.embed`.

    Returns:
        The stream after the block, and (batch, tokens) float32; ones for a block that has no such attention.
    """
    block = shallow_copy(block)
    for path, attention in iterate(block, Attention):
        if attention.keys == "stream":
            replace(block, path, Receiving(attention, *stream.shape[:2]))
    out = block(stream, conditioning)
    found = [layer.received[...] for _, layer in iterate(block, Receiving)]
    return out, sum(found) if found else jnp.ones(stream.shape[:2], jnp.float32)
