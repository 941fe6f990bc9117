"""Scaled dot-product attention: float, and with quantized products in simulated or integer execution."""

import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from qvdjax.kernels.attention_splash import splash_attention, splash_suits
from qvdjax.nn.norm import at_least_float32
from qvdjax.nn.scheme import AttentionScheme, Execution
from qvdjax.numerics import Grid, QTensor, Quantizer, quantize
from qvdjax.parallel.rules import constrain

Implementation = Literal["xla", "mapped", "cudnn", "splash"]

# Scores of more elements than this are made one block of queries after the other (1 GiB of float32).
MAXIMUM_SCORES = 2**28


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(head_dim)) v over all keys, or over the first of them; holds no parameters, only how the
    products are computed.

    Attributes:
        keys: Whose tokens its keys are: those of its block's "stream", all of them in their order, or others'.
    """

    def __init__(self, keys: Literal["stream", "context"] = "stream"):
        self.role, self.keys = "attention", keys
        self.scheme, self.execution, self.implementation = AttentionScheme(), "simulate", None

    def __call__(
        self, query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
    ) -> jax.Array:
        """Every query looks at the keys of its sample that count.

        Args:
            query: [batch, queries, heads, head_dim].
            key, value: [batch, keys, heads, head_dim].
            key_lengths: [batch] whole numbers of at least 1: so many keys of each sample count, from the first, and
                those after them (padding) are as if they were not there. None: all.

        Returns:
            Like query.
        """
        scheme = self.scheme
        query, key, value = (self._heads_apart(a) for a in (query, key, value))
        if scheme.qk_bits is None and scheme.pv_bits is None:
            out = dot_product_attention(query, key, value, key_lengths, implementation=self.implementation)
        else:
            out = quantized_attention(query, key, value, key_lengths, scheme=scheme, execution=self.execution)
        out = constrain(out, "batch", None, "attention_heads", None)
        return constrain(out, "batch", "tokens", None, None)

    def _heads_apart(self, x: jax.Array) -> jax.Array:
        """On a mesh: from tokens split to heads split, one all-to-all of the activation (Ulysses, arXiv 2309.14509).

        Without the first pin, XLA gathers the whole quantized activation instead.
        """
        x = constrain(x, "batch", "tokens", None, None)
        return constrain(x, "batch", None, "attention_heads", None)


def dot_product_attention(
    query, key, value, key_lengths=None, *, implementation: Implementation | None = None
) -> jax.Array:
    """Float attention; shapes as in `Attention`. Scores and softmax are at least float32.

    `implementation`:
        "xla": batched products; blocks of queries where the scores would be too large.
        "mapped": one head of one sample after the other, recomputed in the backward pass. Scores then stay in the cache
            of a CPU, where this is 5 to 10 times as fast; elsewhere it is slow.
        "cudnn": cuDNN's flash attention, for half-precision arrays on a GPU and heads of at most 128 features.
        "splash": flash attention on TPU, for heads of 128 features or a multiple; under a mesh every device takes its
            own heads (see `splash_attention`).
        None: "cudnn" or "splash" where they apply, "mapped" on CPU outside meshes, otherwise "xla". "xla" by name turns
            both off.
    """
    if implementation is None:
        implementation = _best_implementation(query, key)
    if implementation == "cudnn":
        lengths = None if key_lengths is None else key_lengths.astype(jnp.int32)
        return jax.nn.dot_product_attention(query, key, value, key_value_seq_lengths=lengths, implementation="cudnn")
    if implementation == "splash":
        return splash_attention(query, key, value, key_lengths)
    if implementation == "mapped":
        return _mapped(query, key, value, key_lengths)
    if implementation != "xla":
        raise ValueError(f"unknown implementation {implementation!r}: use one of {', '.join(get_args(Implementation))}")

    def attend(query):
        product = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=_wide(query))
        scores = mask_uncounted(_scores(query, product), key_lengths)
        probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", probabilities, value).astype(query.dtype)

    return _by_query_blocks(attend, query, key.shape[1])


def _best_implementation(query, key) -> Implementation:
    mesh, backend = jax.sharding.get_abstract_mesh(), jax.default_backend()
    if _is_for_tpu(mesh):
        return "splash" if splash_suits(query, key) else "xla"
    if backend == "gpu" and query.dtype in (jnp.bfloat16, jnp.float16) and _cudnn_suits(query.shape[-1]):
        return "cudnn"
    # A mesh may describe other devices than this process has, and "mapped" would gather a sharded batch.
    return "mapped" if backend == "cpu" and mesh.empty else "xla"


def _cudnn_suits(head_dim: int) -> bool:
    """What cuDNN takes on every GPU that has it; Hopper and later would take heads of 256 features."""
    return head_dim <= 128 and head_dim % 8 == 0


def _is_for_tpu(mesh) -> bool:
    """Whether a program traced under this mesh is for TPUs; a described mesh is, wherever it is compiled."""
    if mesh.abstract_device is None:  # no mesh, or one of axis sizes alone
        return jax.default_backend() == "tpu"
    return mesh.abstract_device.device_kind.startswith("TPU")


def _mapped(query, key, value, key_lengths):
    @jax.checkpoint
    def one_head(arrays):  # [queries, head_dim], [keys, head_dim] twice, [1] or None
        q, k, v, length = arrays
        product = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=_wide(q))
        scores = mask_uncounted(_scores(q, product), length)
        return jax.nn.softmax(scores, axis=-1).astype(v.dtype) @ v

    batch, _, heads, _ = query.shape
    arrays = (rearrange(a, "b t h d -> (b h) t d") for a in (query, key, value))
    lengths = None if key_lengths is None else repeat(key_lengths, "b -> (b h) 1", h=heads)
    heads = jax.lax.map(one_head, (*arrays, lengths))
    return rearrange(heads, "(b h) t d -> b t h d", b=batch).astype(query.dtype)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)


def _scores(query, product):
    return product * (1 / math.sqrt(query.shape[-1]))


def mask_uncounted(scores, key_lengths):
    """Scores [batch, ..., keys] whose keys beyond `key_lengths` [batch] are so low that they get no probability."""
    if key_lengths is None:
        return scores
    lengths = key_lengths.reshape(-1, *(1,) * (scores.ndim - 1))  # [batch] -> [batch, 1, ..., 1]
    return jnp.where(jnp.arange(scores.shape[-1]) < lengths, scores, jnp.finfo(scores.dtype).min)


def _by_query_blocks(attend, query, keys: int):
    """Apply `attend` to all queries at once, or block after block where the scores would be too large."""
    batch, queries, heads, _ = query.shape
    if batch * heads * queries * keys <= MAXIMUM_SCORES:
        return attend(query)
    block = max(128, MAXIMUM_SCORES // (batch * heads * keys) // 128 * 128)
    blocks = -(-queries // block)
    padded = jnp.pad(query, ((0, 0), (0, blocks * block - queries), (0, 0), (0, 0)))
    # Recomputed in the backward pass, which would otherwise keep the scores of all blocks.
    out = jax.lax.map(jax.checkpoint(attend), rearrange(padded, "b (blocks q) h d -> blocks b q h d", blocks=blocks))
    return rearrange(out, "blocks b q h d -> b (blocks q) h d")[:, :queries]


def quantized_attention(
    query, key, value, key_lengths=None, *, scheme: AttentionScheme, execution: Execution
) -> jax.Array:
    """Attention whose products are quantized as `scheme` says; shapes as in `Attention`.

    Integer and simulated execution use the same codes: the first multiplies int8 into int32. Keys and values that do
    not count take no part in the mean of the keys nor in the ranges of the values.
    """
    dtype = query.dtype
    query, key, value = (rearrange(at_least_float32(a), "b t h d -> b h t d") for a in (query, key, value))
    if key_lengths is not None:
        counts = jnp.arange(key.shape[-2]) < key_lengths[:, None]  # [batch, keys]
        key, value = (jnp.where(counts[:, None, :, None], a, 0) for a in (key, value))  # [batch, heads, keys, head_dim]
    if scheme.smooth_key:  # adds one constant to all scores of a query
        number = key.shape[-2] if key_lengths is None else key_lengths.astype(key.dtype)[:, None, None, None]
        key = key - key.sum(axis=-2, keepdims=True) / number
    if scheme.qk_bits is not None:
        tokens = Quantizer(scheme.qk_bits, granularity="token")
        key = quantize(key, tokens, jnp.int8)
    if scheme.pv_bits is not None:
        # One range a channel: the contraction of the second product runs over tokens, so these come last.
        value = quantize(rearrange(value, "b h t d -> b h d t"), Quantizer(scheme.pv_bits), jnp.int8)

    def attend(block):  # [batch, queries, heads, head_dim]
        q = rearrange(block, "b t h d -> b h t d")
        if scheme.qk_bits is not None:
            product = _batched(quantize(q, tokens, jnp.int8), key, execution)
        else:
            product = _einsum_transposed(q, key)
        scores = mask_uncounted(_scores(q, product), key_lengths)
        unnormalised = jnp.exp(scores - scores.max(axis=-1, keepdims=True))  # [b, h, q, k] in (0, 1]
        out, total = _weigh(unnormalised, value, scheme.pv_bits, execution)
        return rearrange(out / total, "b h t d -> b t h d").astype(dtype)

    return _by_query_blocks(attend, rearrange(query, "b h t d -> b t h d"), key.shape[-2])


def _weigh(probabilities, value, bits, execution):
    """sum_k p_k v_k and sum_k p_k. Quantized probabilities are summed as quantized, so that a row still averages."""
    if bits is None:
        return jnp.einsum("bhqk,bhkd->bhqd", probabilities, value), probabilities.sum(axis=-1, keepdims=True)
    grid = Grid(bits, symmetric=False)
    scale = jnp.full((1, 1, 1, 1), 1 / (2**bits - 1), probabilities.dtype)
    zero_point = jnp.full_like(scale, grid.low)  # probability 0 is the lowest code
    codes = grid.encode(probabilities, scale, zero_point).astype(jnp.int8)
    quantized = QTensor(codes, scale, zero_point, bits)
    return _batched(quantized, value, execution), quantized.dequantize().sum(axis=-1, keepdims=True)


def _einsum_transposed(a, b):
    return jnp.einsum("bhqd,bhkd->bhqk", a, b, precision=jax.lax.Precision.HIGHEST)


def _batched(a: QTensor, b: QTensor, execution: Execution) -> jax.Array:
    """a [batch, heads, m, n] times b [batch, heads, k, n], b symmetric -> float [batch, heads, m, k]."""
    if execution == "simulate":
        return _einsum_transposed(a.dequantize(), b.dequantize())
    contraction = (((3,), (3,)), ((0, 1), (0, 1)))
    total = jax.lax.dot_general(a.codes, b.codes, contraction, preferred_element_type=jnp.int32)  # [b, h, m, k]
    if a.zero_point is not None:
        b_sum = b.codes.astype(jnp.int32).sum(axis=-1)  # [batch, heads, k]
        total = total - a.zero_point.astype(jnp.int32) * b_sum[:, :, None, :]
    b_scale = rearrange(b.scale, "b h k 1 -> b h 1 k")
    return total.astype(a.scale.dtype) * a.scale * b_scale
