"""Parts that encoders of texts and images share."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import Param, at_least_float32


class Embedding(nnx.Module):
    """A vector for each number below `count`.

    Attributes:
        weight: [count, width].
    """

    def __init__(self, count: int, width: int, *, key: jax.Array, dtype, axes: tuple = (None, "embed")):
        self.weight = Param(jax.random.normal(key, (count, width), dtype), axes=axes)

    def __call__(self, numbers: jax.Array) -> jax.Array:
        """Whole numbers [...] -> [..., width]."""
        return self.weight[...][numbers]


def attend(
    query: jax.Array, key: jax.Array, value: jax.Array, *, scale: float, bias: jax.Array | None = None,
    counts: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(scale q k^T + bias) v over the keys that count; scores and softmax are at least float32.

    Args:
        query, key, value: (batch, tokens, heads, head_dim).
        bias: Of the scores, broadcast to (batch, heads, queries, keys).
        counts: Which keys a query sees, bool, broadcast to the same; each query sees one at least.

    Returns:
        Like query.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=wide)
    if bias is not None:
        scores = scores + at_least_float32(bias)
    if counts is not None:
        scores = jnp.where(counts, scores, jnp.finfo(scores.dtype).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", probabilities, value).astype(query.dtype)


def seen_before(length: int, mask: jax.Array | None) -> jax.Array:
    """The keys that count where a token sees those before it and itself, as `attend` wants them.

    Args:
        length: Tokens of a text.
        mask: (batch, tokens), zero for padding, which no token looks at; None: all are looked at.

    Returns:
        bool (batch or 1, 1, queries, keys).
    """
    counts = jnp.tril(jnp.ones((length, length), bool))[None, None]  # (1, 1, queries, keys)
    return counts if mask is None else counts & (mask != 0)[:, None, None, :]  # (batch, 1, queries, keys)


def stream_dtype(weight: jax.Array) -> jnp.dtype:
    """What an encoder computes in: the type of its weights, float32 where these are float16.

    The stream of T5 grows beyond float16's range, see transformers' T5LayerFF and T5Block.
    """
    return jnp.dtype(jnp.float32) if weight.dtype == jnp.float16 else weight.dtype
