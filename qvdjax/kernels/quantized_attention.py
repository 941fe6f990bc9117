"""Attention whose two products are of quantized arrays: one function, its plain reference, and its kernels."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.kernels.attention import by_query_blocks, mask_uncounted, scaled
from qvdjax.kernels.attention_float8_cudnn import cudnn_float8, cudnn_refusal
from qvdjax.kernels.attention_preparation import check_codebook, prepared, quantize_keys
from qvdjax.kernels.attention_quantized_gpu import hopper_quantized, hopper_refusal
from qvdjax.kernels.attention_quantized_tpu import flash_quantized, flash_refusal
from qvdjax.kernels.dispatch import Choice, Implementation, Option, choose, target
from qvdjax.numerics import Grid, QTensor, Quantizer, quantize


def quantized_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *,
    qk_bits: int | None, pv_bits: int | None, codebook: str | None = None, smooth_key: bool = True,
    key_block: int | None = None, pv_block: int | None = None, implementation: Implementation | None = None,
) -> jax.Array:  # fmt: skip
    """softmax(q k^T / sqrt(head_dim)) v, its products of quantized arrays; scores and softmax are float32.

    Keys and values that do not count take no part in the mean of the keys nor in any range. NaN comes through: one in a
    query makes that query's row NaN, one in a key everything, one in a value its channel.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, heads, head_dim].
        key_lengths: [batch] whole numbers of at least 1: so many keys of each sample count, from the first. None: all.
        qk_bits: Of queries (one symmetric range a token and head) and keys; None multiplies floats.
        pv_bits: Of values (one symmetric range a channel, over tokens) and probabilities: those of a query and
            `pv_block` neighbouring keys lie in [0, 1] after division by their largest, an unsigned range; they are
            summed as quantized, so that a row still averages. None multiplies floats.
        codebook: "float8_e4m3fn" for float8 in the place of integers, of 8 bits: the largest of a range becomes 448,
            of probabilities too, and products are summed in float32.
        smooth_key: Subtract the mean key over tokens first, which leaves the softmax unchanged and takes away the
            channel offsets that waste the range (SageAttention, arXiv 2410.02367 section 3.1).
        key_block: So many neighbouring keys of a head share a range; None for a range each.
        pv_block: See `pv_bits`; None for all keys of a query.
        implementation: None for what `quantized_attention_choice` says, or by name:
            "xla": products of codes, scores in memory, blocks of queries where they would be too large.
            "simulate": the same codes multiplied as floats. The reference.
            "pallas_tpu": a flash kernel, see `qvdjax.kernels.attention_quantized_tpu`.
            "mosaic_gpu": one for Hopper, whose ranges of probabilities are of 128 keys where `pv_block` says more; see
            `qvdjax.kernels.attention_quantized_gpu`.
            "cudnn": NVIDIA's, of float8, whose ranges are coarser; see `qvdjax.kernels.attention_float8_cudnn`.

    Returns:
        Like query.

    Raises:
        UserError: An implementation that is not there or cannot take the arrays.
        ValueError: Another codebook, or float8 of other bits.
    """
    check_codebook(codebook, qk_bits, pv_bits)
    blocks = {"codebook": codebook, "key_block": key_block, "pv_block": pv_block}
    choice = quantized_attention_choice(
        query, key, qk_bits=qk_bits, pv_bits=pv_bits, **blocks, lengths=key_lengths is not None, asked=implementation
    )  # fmt: skip
    if choice.implementation == "cudnn":
        return cudnn_float8(query, key, value, smooth_key=smooth_key)
    if choice.implementation == "pallas_tpu":
        return flash_quantized(
            query, key, value, key_lengths, qk_bits=qk_bits, pv_bits=pv_bits, smooth_key=smooth_key, **blocks
        )
    if choice.implementation == "mosaic_gpu":
        return hopper_quantized(
            query, key, value, key_lengths, qk_bits=qk_bits, pv_bits=pv_bits, smooth_key=smooth_key,
            key_block=key_block,
        )  # fmt: skip
    dtype, exact = query.dtype, choice.implementation == "xla"
    query, key, value = (rearrange(_wide(a), "b t h d -> b h t d") for a in (query, key, value))
    key, value = prepared(key, value, key_lengths, smooth_key=smooth_key, axis=2)
    if qk_bits is not None:
        key = quantize_keys(key, Grid(qk_bits, codebook=codebook), key_block)
    if pv_bits is not None:
        # One range a channel: the contraction of the second product runs over tokens, so these come last.
        value = quantize(rearrange(value, "b h t d -> b h d t"), Quantizer(pv_bits, codebook=codebook), jnp.int8)

    def attend(block):  # [batch, queries, heads, head_dim]
        q = rearrange(block, "b t h d -> b h t d")
        if qk_bits is not None:
            quantizer = Quantizer(qk_bits, granularity="token", codebook=codebook)
            product = _batched(quantize(q, quantizer, jnp.int8), key, exact)
        else:
            product = _einsum_transposed(q, key)
        scores = mask_uncounted(scaled(q, product), key_lengths)
        if pv_bits is None:
            unnormalised = jnp.exp(scores - scores.max(axis=-1, keepdims=True))  # [b, h, q, k] in (0, 1]
            out, total = jnp.einsum("bhqk,bhkd->bhqd", unnormalised, value), unnormalised.sum(axis=-1, keepdims=True)
        else:
            out, total = _weigh(scores, value, pv_block, exact)
        return rearrange(out / total, "b h t d -> b t h d").astype(dtype)

    return by_query_blocks(attend, rearrange(query, "b h t d -> b t h d"), key.shape[-2])


def quantized_attention_choice(
    query: jax.Array, key: jax.Array, *, qk_bits: int | None, pv_bits: int | None, codebook: str | None = None,
    key_block: int | None = None, pv_block: int | None = None, lengths: bool = False,
    asked: Implementation | None = None,
) -> Choice:  # fmt: skip
    """What computes `quantized_attention` of such arrays on the device that the program is for, and why.

    `lengths` says that keys have lengths. Raises `UserError` as `choose` does. No values are looked at.
    """
    device = target()
    asks = {
        "qk_bits": qk_bits, "pv_bits": pv_bits, "codebook": codebook, "key_block": key_block, "pv_block": pv_block
    }  # fmt: skip
    elsewhere = f"the program is for {device.kind}"
    on_tpu = on_hopper = by_cudnn = elsewhere
    if device.platform == "tpu":
        on_tpu = flash_refusal(query.shape, query.dtype, key.shape[1], device, **asks)
    elif device.platform == "gpu":
        on_hopper = hopper_refusal(query.shape, query.dtype, device, **asks)
        by_cudnn = cudnn_refusal(query.shape, query.dtype, device, lengths=lengths, **asks)
    return choose("quantized attention", [
        Option("pallas_tpu", on_tpu, "scores stay in the chip"),
        Option("xla", None, "takes everything, and no kernel is chosen for these arrays here"),
        Option("simulate"),
        Option("mosaic_gpu", on_hopper),  # by name alone, as the next: they were not timed yet
        Option("cudnn", by_cudnn),
    ], asked)  # fmt: skip


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _weigh(scores, value: QTensor, block: int | None, exact: bool):
    """sum_k p_k v_k [b, h, q, d] and sum_k p_k [b, h, q, 1] over quantized p and v, both over the largest p.

    scores [b, h, q, k]; value [b, h, d, k].
    """
    keys = scores.shape[-1]
    size = keys if block is None else min(block, keys)
    padding = -keys % size
    scores = jnp.pad(scores, ((0, 0),) * 3 + ((0, padding),), constant_values=jnp.finfo(scores.dtype).min)
    codes = jnp.pad(value.codes, ((0, 0),) * 3 + ((0, padding),))
    scores = rearrange(scores, "b h q (n c) -> b h n q c", c=size)
    codes = rearrange(codes, "b h d (n c) -> b h n d c", c=size)
    bits, codebook = value.bits, value.codebook
    value = dataclasses.replace(value, codes=codes, scale=value.scale[:, :, None])
    largest = scores.max(axis=-1, keepdims=True)  # [b, h, n, q, 1]
    grid = Grid(bits, symmetric=codebook is not None, codebook=codebook)
    scale = jnp.full((1,) * 5, 1 / (2**bits - 1 if codebook is None else grid.largest), scores.dtype)
    zero_point = jnp.full_like(scale, grid.low) if codebook is None else None  # probability 0 is the lowest code
    unnormalised = jnp.exp(scores - largest)  # in [0, 1]
    codes = grid.encode(unnormalised, scale, zero_point).astype(jnp.int8)
    quantized = QTensor(codes, scale, zero_point, bits, codebook)
    share = jnp.exp(largest - largest.max(axis=2, keepdims=True))  # of a block, [b, h, n, q, 1]
    total = quantized.dequantize().sum(axis=-1, keepdims=True)
    # The codes of NaN are some number, so the sum says it.
    total = jnp.where(jnp.isnan(unnormalised).any(axis=-1, keepdims=True), jnp.nan, total)
    return (_batched(quantized, value, exact) * share).sum(axis=2), (total * share).sum(axis=2)


def _einsum_transposed(a, b):
    return jnp.einsum("...qd,...kd->...qk", a, b, precision=jax.lax.Precision.HIGHEST)


def _batched(a: QTensor, b: QTensor, exact: bool) -> jax.Array:
    """a [..., m, n] times b [..., k, n], b symmetric -> float [..., m, k]; of codes if `exact`, else of floats."""
    if not exact:
        return _einsum_transposed(a.dequantize(), b.dequantize())
    leading = tuple(range(a.codes.ndim - 2))
    contraction = (((a.codes.ndim - 1,), (b.codes.ndim - 1,)), (leading, leading))
    kind = jnp.float32 if a.grid.floating else jnp.int32
    total = jax.lax.dot_general(a.operands, b.operands, contraction, preferred_element_type=kind)  # [..., m, k]
    if a.zero_point is not None:
        b_sum = b.codes.astype(jnp.int32).sum(axis=-1)  # [..., k]
        total = total - a.zero_point.astype(jnp.int32) * b_sum[..., None, :]
    return total.astype(a.scale.dtype) * a.scale * rearrange(b.scale, "... k 1 -> ... 1 k")
