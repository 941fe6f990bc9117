"""Flash attention on TPU whose products are of codes, int8 or float8: scores and probabilities never leave the chip.

One pass over the keys (Dao et al. 2022, arXiv 2205.14135), with the numerics of `qvdjax.kernels.quantized_attention`:

- Queries are quantized inside, once a block of them: one range a token, so no pass over memory makes their codes.
- Keys and values are quantized before, in XLA, which reads each twice and writes codes of one byte.
- A block of scores is int32, of float8 float32; a row's range, the keys' and 1 / sqrt(head_dim) make scores of it in
  one or two products.
- Probabilities of a query and a block of keys are quantized by their largest, which a pass over the keys knows; blocks
  are then weighed by how far their largest is below the largest of all.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.kernels import tuning
from qvdjax.kernels.attention_preparation import LOG2_E, NO_SCORE, key_scales, prepared
from qvdjax.kernels.dispatch import Device, target
from qvdjax.kernels.head_split import over_heads
from qvdjax.kernels.rounding_tpu import codes_of, largest_code
from qvdjax.kernels.tiles import in_tiles
from qvdjax.numerics import Grid
from qvdjax.numerics.float8 import LARGEST
from qvdjax.numerics.quantizer import largest_magnitude

LANES, ROWS = 128, 32  # what an array of int8 is tiled by
# Settings where no table has any: rows and columns of scores that are held at a time, and keys that are read at once.
QUERY_BLOCK, SCORE_BLOCK, KEY_BLOCK = 512, 512, 1024


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut.

    Attributes:
        queries: Rows of scores that are held at a time.
        scores: Columns of them; a block of keys that share a range of probabilities.
        keys: Keys that are read at once, a multiple of `scores`.
    """

    queries: int
    scores: int
    keys: int


def flash_refusal(
    query_shape: tuple[int, ...], dtype, keys: int, device: Device, *, qk_bits: int | None, pv_bits: int | None,
    codebook: str | None, key_block: int | None, pv_block: int | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot take queries of a shape [batch, queries, heads, head_dim] and so many keys; else None."""
    if qk_bits is None and pv_bits is None:
        return "nothing is quantized"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(dtype).name}"
    if query_shape[-1] > 256:
        return f"heads of {query_shape[-1]} features are more than 256"
    row = tuning.settings("quantized_attention", device) or {}
    if codebook is None and not row.get("integer_products", True):
        return f"{device.kind} has no products of integers"
    if codebook is not None and not row.get("float8_products", False):
        return f"{device.kind} has no products of {codebook}"
    if pv_bits is not None and (pv_block is None or pv_block % LANES) and keys > (pv_block or 0):
        return f"probabilities share a range over {pv_block or 'all'} keys; it needs a multiple of {LANES}"
    block = _blocks(device, keys, pv_bits, pv_block, key_block).scores
    if key_block is not None and key_block % block and keys > key_block:
        return f"{key_block} keys share a range, which is no multiple of {block if pv_bits is not None else LANES}"
    return None


def flash_quantized(
    query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None, *, qk_bits: int | None,
    pv_bits: int | None, codebook: str | None = None, smooth_key: bool = True, key_block: int | None = None,
    pv_block: int | None = None, interpret: bool = False, query_block: int | None = None,
) -> jax.Array:  # fmt: skip
    """Attention of quantized arrays; see `quantized_attention` for everything but these.

    Under a mesh heads are split (`qvdjax.kernels.head_split`).

    Args:
        interpret: Run the kernel's arithmetic on any device, slowly (for tests).
        query_block: In the place of the table's.
    """
    blocks = _blocks(target(), key.shape[1], pv_bits, pv_block, key_block)
    if query_block is not None:
        blocks = dataclasses.replace(blocks, queries=query_block)
    attend = functools.partial(
        _on_one_device, qk_bits=qk_bits, pv_bits=pv_bits, codebook=codebook, smooth_key=smooth_key,
        key_block=key_block, blocks=blocks, interpret=interpret,
    )  # fmt: skip
    return over_heads(attend, query, key, value, key_lengths)


def _blocks(device: Device, keys: int, pv_bits: int | None, pv_block: int | None, key_block: int | None) -> Blocks:
    row = tuning.settings("quantized_attention", device) or {}
    scores = row.get("score_block", SCORE_BLOCK)
    if pv_bits is None and key_block is not None:  # scores that are held have keys of one range
        scores = max(LANES, math.gcd(scores, key_block) // LANES * LANES)
    if pv_bits is not None:
        scores = pv_block if pv_block is not None and not pv_block % LANES else -(-keys // LANES) * LANES
    scores = min(scores, -(-keys // LANES) * LANES)
    read = min(max(1, row.get("key_block", KEY_BLOCK) // scores), -(-keys // scores)) * scores
    return Blocks(row.get("query_block", QUERY_BLOCK), scores, read)


def _on_one_device(
    query, key, value, key_lengths=None, *, qk_bits, pv_bits, codebook, smooth_key, key_block, blocks: Blocks, interpret
):
    """All [batch, tokens, heads, head_dim], but for `key_lengths` [batch]."""
    dtype, heads, head_dim, keys = query.dtype, query.shape[2], query.shape[3], key.shape[1]
    wide = -head_dim % LANES
    # Tokens by features of all heads, as projections write them and as the kernel reads them, a head's columns at a
    # time: no array is transposed.
    q, k, v = (
        rearrange(jnp.pad(a, ((0, 0), (0, 0), (0, 0), (0, wide))), "b t h d -> b t (h d)") for a in (query, key, value)
    )
    # Keys and values are read twice, for ranges and for codes. Left to itself, the compiler may write the wider sums
    # that a projection makes them of (int32, even) and read those twice.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    k, v = prepared(k.astype(jnp.float32), v.astype(jnp.float32), key_lengths, smooth_key=smooth_key, axis=1)
    key_scale = jnp.ones((key.shape[0], heads, 1, keys), jnp.float32)
    if qk_bits is not None:
        grid = Grid(qk_bits, codebook=codebook)
        apart = rearrange(k, "b t (h d) -> b t h d", h=heads)
        tiles = in_tiles(apart)  # [batch, tiles, heads, tokens of one, head_dim]
        largest = rearrange(largest_magnitude(tiles, axis=-1), "b n h a -> b h (n a)")
        scale = key_scales(largest, grid, key_block)  # [batch, heads, keys]
        spread = rearrange(scale, "b h (n a) -> b n h a 1", a=tiles.shape[3])
        codes = grid.operands(grid.encode(tiles, spread, None))
        k, key_scale = rearrange(codes, "b n h a d -> b (n a) (h d)"), rearrange(scale, "b h t -> b h 1 t")
    value_scale = jnp.ones((value.shape[0], heads, 1, head_dim + wide), jnp.float32)
    if pv_bits is not None:
        grid = Grid(pv_bits, codebook=codebook)
        scale = grid.from_largest(largest_magnitude(v, axis=1, keepdims=True))  # [batch, 1, heads x head_dim]
        v, value_scale = grid.operands(grid.encode(v, scale, None)), rearrange(scale, "b 1 (h d) -> b h 1 d", h=heads)
    k, v = k if qk_bits is not None else k.astype(dtype), v if pv_bits is not None else v.astype(dtype)
    if v.dtype != jnp.int8:
        # Behind the last key the kernel reads what happens to be there. A score is replaced, whatever it is, and so is
        # its probability of 0; but 0 times a value that is no number, which int8 alone cannot be, is none either.
        v = jnp.pad(v, ((0, 0), (0, -keys % blocks.keys), (0, 0)))
    lengths = jnp.full(query.shape[:1], keys, jnp.int32) if key_lengths is None else key_lengths.astype(jnp.int32)
    out = _call(
        lengths, q, k, key_scale, v, value_scale, heads=heads, qk_bits=qk_bits, pv_bits=pv_bits,
        by_key=key_block is None, factor=LOG2_E / math.sqrt(head_dim), blocks=blocks, interpret=interpret,
    )  # fmt: skip
    return rearrange(out, "b t (h d) -> b t h d", h=heads)[..., :head_dim]


def _call(lengths, q, k, key_scale, v, value_scale, *, heads, qk_bits, pv_bits, by_key, factor, blocks, interpret):
    """Queries, keys and values [batch, tokens, heads x head_dim] -> like the queries; values that are no int8 are
    given in whole blocks."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    batch, queries, width = q.shape
    head_dim, keys = width // heads, k.shape[1]
    rows = queries if queries <= blocks.queries else blocks.queries
    inner = blocks.keys // blocks.scores
    kernel = functools.partial(
        _kernel, qk_bits=qk_bits, pv_bits=pv_bits, by_key=by_key, factor=factor, size=blocks.scores, inner=inner
    )
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, heads, pl.cdiv(queries, rows), pl.cdiv(keys, blocks.keys)),
        in_specs=[
            pl.BlockSpec((None, rows, head_dim), lambda b, h, i, j, _: (b, i, h)),
            pl.BlockSpec((None, blocks.keys, head_dim), lambda b, h, i, j, _: (b, j, h)),
            pl.BlockSpec((None, None, 1, blocks.keys), lambda b, h, i, j, _: (b, h, 0, j)),
            pl.BlockSpec((None, blocks.keys, head_dim), lambda b, h, i, j, _: (b, j, h)),
            pl.BlockSpec((None, None, 1, head_dim), lambda b, h, i, j, _: (b, h, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, rows, head_dim), lambda b, h, i, j, _: (b, i, h)),
        scratch_shapes=[
            pltpu.VMEM((rows, head_dim), q.dtype if qk_bits is None else k.dtype),
            pltpu.VMEM((rows, 1), jnp.float32),  # the factor that makes scores of a row's products
            pltpu.VMEM((rows, 1), jnp.float32),  # the largest score so far
            pltpu.VMEM((rows, 1), jnp.float32),  # the sum of probabilities over it
            pltpu.VMEM((rows, head_dim), jnp.float32),  # the sum of values over it
        ],
    )  # fmt: skip
    products = 2 * batch * heads * queries * keys * head_dim
    return pl.pallas_call(
        kernel,
        grid_spec=grid_spec,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * products, transcendentals=batch * heads * queries * keys,
            bytes_accessed=2 * q.size * q.dtype.itemsize + pl.cdiv(queries, rows) * (k.nbytes + v.nbytes),
        ),
        interpret=interpret,
        name="quantized_attention",
    )(lengths, q, k, key_scale, v, value_scale)  # fmt: skip


def _kernel(
    lengths, q_ref, k_ref, key_scale_ref, v_ref, value_scale_ref, out_ref, codes_ref, factor_ref, most_ref,
    total_ref, sum_ref, *, qk_bits, pv_bits, by_key, factor, size, inner,
):  # fmt: skip
    """One block of queries [rows, head_dim] and of keys [inner x size, head_dim] of a head."""
    from jax.experimental import pallas as pl

    place, length = pl.program_id(3), lengths[pl.program_id(0)]

    @pl.when(place == 0)
    def _():
        q = q_ref[...]
        if qk_bits is None:
            codes_ref[...] = q
            factor_ref[...] = jnp.full_like(factor_ref, factor)
        else:
            q = q.astype(jnp.float32)
            scale = jnp.max(jnp.abs(q), axis=-1, keepdims=True) / largest_code(qk_bits, codes_ref.dtype)
            # Zero, or NaN where the row has one, whatever its largest is said to be: the row becomes NaN.
            scale = jnp.where(scale > 0, scale, 1) + jnp.sum(0 * q, axis=-1, keepdims=True)
            codes_ref[...] = codes_of(q / scale, qk_bits, codes_ref.dtype)
            factor_ref[...] = scale * factor
        most_ref[...] = jnp.full_like(most_ref, -jnp.inf)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def weigh(part: int, ragged: bool):
        here = pl.ds(part * size, size)
        kind = jnp.int32 if k_ref.dtype == jnp.int8 else jnp.float32
        product = jax.lax.dot_general(
            codes_ref[...], k_ref[here, :], (((1,), (1,)), ((), ())), preferred_element_type=kind
        )  # [rows, size]
        row = factor_ref[...]
        if qk_bits is None:
            scores = product * row
        elif by_key:
            scores = product.astype(jnp.float32) * key_scale_ref[:, here] * row
        else:  # one range for all keys of the block
            scores = product.astype(jnp.float32) * (row * key_scale_ref[:, pl.ds(part * size, 1)])
        if ragged:
            token = place * inner * size + part * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
            scores = jnp.where(token < length, scores, NO_SCORE)
        block_most, before = jnp.max(scores, axis=-1, keepdims=True), most_ref[...]  # [rows, 1]
        most = jnp.maximum(before, block_most)
        kept = jnp.exp2(before - most)
        if pv_bits is None:
            probabilities = jnp.exp2(scores - most)
            total = jnp.sum(probabilities, axis=-1, keepdims=True)
            out = jnp.dot(probabilities.astype(v_ref.dtype), v_ref[here, :], preferred_element_type=jnp.float32)
        elif v_ref.dtype == jnp.float8_e4m3fn:
            codes = jnp.exp2(scores - (block_most - math.log2(LARGEST))).astype(v_ref.dtype)
            share = jnp.exp2(block_most - most)
            total = jnp.sum(codes.astype(jnp.float32), axis=-1, keepdims=True) * share
            out = jnp.dot(codes, v_ref[here, :], preferred_element_type=jnp.float32) * share
        else:
            # exp2 of a score plus this is a probability in codes, 0 to 2^bits - 1.
            levels = jnp.round(jnp.exp2(scores - (block_most - math.log2(2**pv_bits - 1))))
            codes = (levels - 2 ** (pv_bits - 1)).astype(jnp.int32).astype(jnp.int8)
            # Probability 0 is the code -2^(bits - 1): what that adds to the product is taken off again.
            ones = jnp.ones((ROWS, size), jnp.int8)
            sums = jnp.dot(ones, v_ref[here, :], preferred_element_type=jnp.int32)[:1]  # [1, head_dim]
            out = jnp.dot(codes, v_ref[here, :], preferred_element_type=jnp.int32) + 2 ** (pv_bits - 1) * sums
            share = jnp.exp2(block_most - most)
            total = jnp.sum(levels, axis=-1, keepdims=True) * share
            out = out.astype(jnp.float32) * share
        most_ref[...] = most
        total_ref[...] = total_ref[...] * kept + total
        sum_ref[...] = sum_ref[...] * kept + out

    for part in range(inner):
        end = place * inner * size + (part + 1) * size
        pl.when(end <= length)(functools.partial(weigh, part, False))
        pl.when((end > length) & (end - size < length))(functools.partial(weigh, part, True))

    @pl.when(place == pl.num_programs(3) - 1)
    def _():
        out_ref[...] = (sum_ref[...] / total_ref[...] * value_scale_ref[...]).astype(out_ref.dtype)
