"""Flash attention on Hopper GPUs whose products are of int8 codes: scores and probabilities never leave the chip.

One pass over the keys, as FlashAttention-3 cuts it (Shah et al. 2024, arXiv 2407.08608): of three warpgroups one copies
keys and values into shared memory ahead of time, two multiply, each its own queries. The numerics are those of
`qvdjax.kernels.quantized_attention`:

- Codes of queries, keys and values are made before, in XLA. Tensor cores take 8-bit operands along the contraction
  only, so values lie with their tokens last.
- A block of scores is int32; a row's scale, the keys' and 1 / sqrt(head_dim) make scores of it.
- Probabilities of a query and `KEYS` neighbouring keys are quantized by their largest, and go through shared memory,
  since registers hold a product's result in another order than an operand of one byte.

No GPU was at hand when it was written: its arithmetic is tested where jax interprets it, and it is lowered for CUDA.
"""

import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.kernels.attention_preparation import LOG2_E, NO_SCORE, prepared, quantize_keys
from qvdjax.kernels.dispatch import Device
from qvdjax.kernels.head_split import over_heads
from qvdjax.numerics import Grid, Quantizer, quantize

QUERIES = 64  # of a warpgroup, what an instruction of the tensor cores takes
MULTIPLIERS = 2  # warpgroups that multiply
KEYS = 128  # keys at a time, and that share a range of probabilities
AHEAD = 3  # blocks of keys that are in shared memory
WIDEST = 128  # features of a head for which registers suffice
_REGISTERS, _REGISTERS_OF_COPIER = 232, 40


def hopper_refusal(
    query_shape: tuple[int, ...], dtype, device: Device, *, qk_bits: int | None, pv_bits: int | None,
    codebook: str | None, key_block: int | None, pv_block: int | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take queries of a shape [batch, queries, heads, head_dim]; None where it can."""
    if not any(name in device.kind for name in ("H100", "H200", "GH200")):
        return f"it is for Hopper, and the program is for {device.kind}"
    if qk_bits is None or pv_bits is None:
        return "it multiplies codes in both products, and one is of floats"
    if codebook is not None:
        return f"it has products of integers, not of {codebook}"
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, not {jnp.dtype(dtype).name}"
    if query_shape[-1] > WIDEST:
        return f"heads of {query_shape[-1]} features are more than {WIDEST}"
    if key_block is not None and key_block % KEYS:
        return f"{key_block} keys share a range, which is no multiple of {KEYS}"
    if pv_block is not None and pv_block % KEYS:
        return f"probabilities share a range over {pv_block} keys, which is no multiple of {KEYS}"
    return None


def hopper_quantized(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *, qk_bits: int,
    pv_bits: int, smooth_key: bool = True, key_block: int | None = None, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    """Attention of quantized arrays; see `quantized_attention` for everything but these.

    Probabilities have a range for every `KEYS` neighbouring keys, which is finer than models ask for (512), because
    more scores do not fit into registers. Under a mesh heads are split (`qvdjax.kernels.head_split`).

    Args:
        interpret: Let jax interpret the kernel on any device, slowly (for tests).
    """
    attend = functools.partial(
        _on_one_device, qk_bits=qk_bits, pv_bits=pv_bits, smooth_key=smooth_key, key_block=key_block,
        interpret=interpret,
    )  # fmt: skip
    return over_heads(attend, query, key, value, key_lengths)


def _on_one_device(query, key, value, key_lengths=None, *, qk_bits, pv_bits, smooth_key, key_block, interpret):
    """All [batch, tokens, heads, head_dim], but for `key_lengths` [batch]."""
    (batch, queries, _, head_dim), keys = query.shape, key.shape[1]
    rows, columns = -queries % (QUERIES * MULTIPLIERS), -keys % KEYS  # tokens that are missing to whole blocks
    wide = -head_dim % (64 if head_dim <= 64 else 128)  # what shared memory is swizzled by
    q, k, v = (rearrange(a.astype(jnp.float32), "b t h d -> b h t d") for a in (query, key, value))
    k, v = prepared(k, v, key_lengths, smooth_key=smooth_key, axis=2)

    q = quantize(q, Quantizer(qk_bits, granularity="token"), jnp.int8)  # scales [batch, heads, queries, 1]
    k = quantize_keys(k, Grid(qk_bits), key_block)
    # One range a channel, and what the second product runs over comes last.
    v = quantize(rearrange(v, "b h t d -> b h d t"), Quantizer(pv_bits), jnp.int8)
    row_factor = _padded(q.scale[..., 0] * (LOG2_E / math.sqrt(head_dim)), rows)
    k_scale, v_scale = _padded(k.scale[..., 0], columns), _padded(v.scale[..., 0], wide)
    q, k, v = _padded(q.codes, rows, wide), _padded(k.codes, columns, wide), _padded(v.codes, wide, columns)
    # What values add up to in a block, since the lowest code of a probability stands for zero.
    sums = rearrange(v, "b h d (n c) -> b h n d c", c=KEYS).astype(jnp.int32).sum(axis=-1).astype(jnp.float32)
    lengths = jnp.full((batch,), keys, jnp.int32) if key_lengths is None else key_lengths.astype(jnp.int32)
    out = _call(lengths, q, row_factor, k, k_scale, v, sums, v_scale, pv_bits=pv_bits, dtype=query.dtype,
                interpret=interpret)  # fmt: skip
    return rearrange(out, "b h t d -> b t h d")[:, :queries, :, :head_dim]


def _padded(x: jax.Array, *more: int) -> jax.Array:
    """[batch, heads, ...] with so many zeros behind each of the last axes."""
    return jnp.pad(x, ((0, 0), (0, 0), *((0, number) for number in more)))


def _call(lengths, q, row_factor, k, k_scale, v, sums, v_scale, *, pv_bits, dtype, interpret):
    """q, k [batch, heads, tokens, head_dim] and v [batch, heads, head_dim, tokens] in whole blocks -> like q."""
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, heads, queries, head_dim = q.shape
    width = min(head_dim, 128)  # bytes of a row of shared memory that are swizzled
    ahead = min(AHEAD, k.shape[2] // KEYS)

    def codes(*shape, row):
        return plgpu.SMEM(shape, jnp.int8, transforms=(plgpu.TilingTransform((8, row)), plgpu.SwizzleTransform(row)))

    scratch = [
        codes(MULTIPLIERS, QUERIES, head_dim, row=width),
        plgpu.SMEM((MULTIPLIERS, QUERIES), jnp.float32),
        codes(ahead, KEYS, head_dim, row=width),
        plgpu.SMEM((ahead, KEYS), jnp.float32),
        codes(ahead, head_dim, KEYS, row=KEYS),
        plgpu.SMEM((ahead, head_dim), jnp.float32),
        codes(MULTIPLIERS, QUERIES, KEYS, row=KEYS),
        plgpu.SMEM((MULTIPLIERS, QUERIES, head_dim), dtype),
        plgpu.SMEM((MULTIPLIERS, head_dim), jnp.float32),
        plgpu.Barrier(num_arrivals=3, num_barriers=MULTIPLIERS),  # queries, their factors and the values' scales
        plgpu.Barrier(num_arrivals=2, num_barriers=ahead),  # keys and their scales
        plgpu.Barrier(num_arrivals=2, num_barriers=ahead),  # values and their sums
        plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=ahead),  # keys were multiplied
        plgpu.Barrier(num_arrivals=MULTIPLIERS, num_barriers=ahead),  # values were
    ]
    return plgpu.kernel(
        functools.partial(_kernel, pv_bits=pv_bits, ahead=ahead, interpret=interpret),
        out_type=jax.ShapeDtypeStruct(q.shape, dtype),
        grid=(heads, queries // (QUERIES * MULTIPLIERS), batch),
        grid_names=("heads", "queries", "batch"),
        num_threads=MULTIPLIERS + 1,
        thread_name="warpgroup",
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreted() if interpret else None,
    )(lengths, q, row_factor, k, k_scale, v, sums, v_scale)


def _interpreted():
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()


def _kernel(
    lengths_ref, q_ref, row_factor_ref, k_ref, k_scale_ref, v_ref, sums_ref, v_scale_ref, out_ref,
    q_smem, row_smem, k_smem, k_scale_smem, v_smem, sums_smem, codes_smem, out_smem, v_scale_smem,
    q_here, k_here, v_here, k_free, v_free, *, pv_bits, ahead, interpret,
):  # fmt: skip
    """`QUERIES` x `MULTIPLIERS` queries of a head, and all its keys."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as plgpu

    batch, head, warpgroup = (jax.lax.axis_index(name) for name in ("batch", "heads", "warpgroup"))
    head_dim = q_ref.shape[-1]
    by_row, by_column = (plgpu.Layout.WGMMA.reduce(axis) for axis in (1, 0))
    length = lengths_ref[batch]
    blocks, whole = pl.cdiv(length, KEYS), jax.lax.div(length, jnp.int32(KEYS))

    # What jax's interpreter does not know: registers have no layout there, and an operand is no view of another.
    def laid_out(array, layout):
        return array if interpret else plgpu.layout_cast(array, layout)

    def product(a_ref, b_ref):
        """a [rows, contraction] times b [columns, contraction], int32 [rows, columns]."""
        if interpret:
            a, b = a_ref[...].astype(jnp.int32), b_ref[...].astype(jnp.int32)
            return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())))

        def multiply(sum_ref):
            plgpu.wgmma(sum_ref, a_ref, b_ref.transpose((1, 0)))
            return sum_ref[...]

        return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.int32))

    def along(row, shape):
        return jax.lax.broadcast_in_dim(row, shape, [0])

    def across(column, shape):
        return jax.lax.broadcast_in_dim(column, shape, [1])

    @pl.when(warpgroup < MULTIPLIERS)
    def _multiply():
        plgpu.set_max_registers(_REGISTERS, action="increase")
        first = jax.lax.axis_index("queries") * (QUERIES * MULTIPLIERS) + warpgroup * QUERIES
        mine, arrived = pl.ds(first, QUERIES), q_here.at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[batch, head, mine], q_smem.at[warpgroup], arrived)
        plgpu.copy_gmem_to_smem(row_factor_ref.at[batch, head, mine], row_smem.at[warpgroup], arrived)
        plgpu.copy_gmem_to_smem(v_scale_ref.at[batch, head], v_scale_smem.at[warpgroup], arrived)
        plgpu.barrier_wait(arrived)
        factor = laid_out(row_smem.at[warpgroup][...], by_row)

        def weigh(block, carry, ragged: bool):
            out, most, total = carry
            slot = jax.lax.rem(block, jnp.int32(ahead))
            plgpu.barrier_wait(k_here.at[slot])
            scores = product(q_smem.at[warpgroup], k_smem.at[slot]).astype(jnp.float32)
            scores *= across(laid_out(k_scale_smem.at[slot][...], by_column), scores.shape)
            scores *= along(factor, scores.shape)
            plgpu.barrier_arrive(k_free.at[slot])
            if ragged:
                if interpret:
                    token = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
                else:
                    token = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
                scores = jnp.where(token + block * KEYS < length, scores, NO_SCORE)
            block_most = scores.max(axis=1)
            new_most = jnp.maximum(most, block_most)
            kept, share = jnp.exp2(most - new_most), jnp.exp2(block_most - new_most)
            # exp2 of a score plus this is a probability in codes, 0 to 2^bits - 1.
            codes = jnp.exp2(scores - along(block_most - math.log2(2**pv_bits - 1), scores.shape))
            codes = jax.lax.round(codes, jax.lax.RoundingMethod.TO_NEAREST_EVEN)
            total = total * kept + codes.sum(axis=1) * share
            codes_smem[warpgroup] = (codes - 2.0 ** (pv_bits - 1)).astype(jnp.int32).astype(jnp.int8)
            plgpu.commit_smem()
            plgpu.barrier_wait(v_here.at[slot])
            weighed = product(codes_smem.at[warpgroup], v_smem.at[slot]).astype(jnp.float32)
            # Probability 0 is the code -2^(bits - 1): what that adds to the product is taken off again.
            weighed += across(laid_out(sums_smem.at[slot][...], by_column) * 2.0 ** (pv_bits - 1), weighed.shape)
            plgpu.barrier_arrive(v_free.at[slot])
            return out * along(kept, out.shape) + weighed * along(share, out.shape), new_most, total

        start = (
            laid_out(jnp.zeros((QUERIES, head_dim), jnp.float32), plgpu.Layout.WGMMA),
            laid_out(jnp.full((QUERIES,), -jnp.inf, jnp.float32), by_row),
            laid_out(jnp.zeros((QUERIES,), jnp.float32), by_row),
        )
        carry = jax.lax.fori_loop(0, whole, functools.partial(weigh, ragged=False), start)
        out, _, total = jax.lax.fori_loop(whole, blocks, functools.partial(weigh, ragged=True), carry)
        out = out / along(total, out.shape) * across(laid_out(v_scale_smem.at[warpgroup][...], by_column), out.shape)
        out_smem[warpgroup] = out.astype(out_smem.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[warpgroup], out_ref.at[batch, head, mine])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup == MULTIPLIERS)
    def _copy():
        plgpu.set_max_registers(_REGISTERS_OF_COPIER, action="decrease")

        def copy(block, _):
            slot = jax.lax.rem(block, jnp.int32(ahead))

            @pl.when(block >= ahead)
            def _wait():
                plgpu.barrier_wait(k_free.at[slot])

            keys = pl.ds(block * KEYS, KEYS)
            plgpu.copy_gmem_to_smem(k_ref.at[batch, head, keys], k_smem.at[slot], k_here.at[slot])
            plgpu.copy_gmem_to_smem(k_scale_ref.at[batch, head, keys], k_scale_smem.at[slot], k_here.at[slot])

            @pl.when(block >= ahead)
            def _wait_for_values():
                plgpu.barrier_wait(v_free.at[slot])

            plgpu.copy_gmem_to_smem(v_ref.at[batch, head, :, keys], v_smem.at[slot], v_here.at[slot])
            plgpu.copy_gmem_to_smem(sums_ref.at[batch, head, block], sums_smem.at[slot], v_here.at[slot])

        def drain(block, _):
            slot = jax.lax.rem(block, jnp.int32(ahead))
            plgpu.barrier_wait(k_free.at[slot])
            plgpu.barrier_wait(v_free.at[slot])

        jax.lax.fori_loop(0, blocks, copy, None)
        # So that no arrival is unseen when the barriers go.
        jax.lax.fori_loop(jnp.maximum(blocks - ahead, 0), blocks, drain, None)
