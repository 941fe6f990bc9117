"""Scaled dot-product attention: float, and with quantized products in simulated or integer execution."""

from typing import Literal

import jax
from einops import rearrange
from flax import nnx

from qvdjax import kernels
from qvdjax.kernels import dot_product_attention
from qvdjax.nn.scheme import AttentionScheme, Execution
from qvdjax.nn.variables import iterate, shallow_copy
from qvdjax.parallel.rules import constrain


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(head_dim)) v over all keys, or over the first of them; holds no parameters, only how the
    products are computed.

    Attributes:
        keys: Whose tokens its keys are: those of its block's "stream", all of them in their order, or others'.
        scheme: How the products are quantized, if at all.
        execution: How quantized products are computed.
        implementation: What computes them (`qvdjax.kernels.Implementation`), None for the best for device and shapes.
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
        # Pinned with heads apart, values would be that for the compiler from the start: on TPU it wrote the sums of
        # their projection, int32, in that shape. Queries and keys come apart for their positions anyway.
        merged = constrain(rearrange(value, "b t h d -> b t (h d)"), "batch", "tokens", None)
        value = rearrange(merged, "b t (h d) -> b t h d", h=value.shape[2])
        query, key, value = (self._heads_apart(a) for a in (query, key, value))
        if scheme.qk_bits is None and scheme.pv_bits is None:
            out = dot_product_attention(query, key, value, key_lengths, implementation=self.implementation)
        else:
            out = quantized_attention(
                query, key, value, key_lengths, scheme=scheme, execution=self.execution,
                implementation=self.implementation,
            )  # fmt: skip
        out = constrain(out, "batch", None, "attention_heads", None)
        return constrain(out, "batch", "tokens", None, None)

    def _heads_apart(self, x: jax.Array) -> jax.Array:
        """On a mesh: from tokens split to heads split, one all-to-all of the activation (Ulysses, arXiv 2309.14509).

        Without the first pin, XLA gathers the whole quantized activation instead.
        """
        x = constrain(x, "batch", "tokens", None, None)
        return constrain(x, "batch", None, "attention_heads", None)


def with_float_attention(model: nnx.Module) -> nnx.Module:
    """The same model around the same arrays, with no product of its attention quantized."""
    copy = shallow_copy(model)
    for _, layer in iterate(copy, Attention):
        layer.scheme = AttentionScheme(reason="for some steps alone")
    return copy


def quantized_attention(
    query, key, value, key_lengths=None, *, scheme: AttentionScheme, execution: Execution,
    implementation: kernels.Implementation | None = None,
) -> jax.Array:  # fmt: skip
    """Attention whose products are quantized as `scheme` says; shapes as in `Attention`.

    Integer and simulated execution use the same codes: the first multiplies int8 into int32 (or float8 into float32),
    by `implementation` or what suits the device best. See `qvdjax.kernels.quantized_attention`.
    """
    return kernels.quantized_attention(
        query, key, value, key_lengths, qk_bits=scheme.qk_bits, pv_bits=scheme.pv_bits, smooth_key=scheme.smooth_key,
        key_block=scheme.key_block, pv_block=scheme.pv_block, codebook=scheme.codebook,
        implementation="simulate" if execution == "simulate" else implementation,
    )  # fmt: skip
