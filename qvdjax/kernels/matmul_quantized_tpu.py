"""One kernel from floats to floats on TPU: round each token, multiply by the codes of a weight, apply scales and more.

What XLA does in several passes over memory is one here: a block of tokens is read once, its ranges and codes are made
in the chip and kept while all output channels go by; sums, int32 or of float8 float32, get their scales, bias, gate and
residual, and only the result is written. Four-bit codes are widened in the chip, so that memory is read for half a byte
each. Scales of groups are applied to the sum of each group, one after the other.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from qvdjax.kernels import tuning
from qvdjax.kernels.dispatch import Device, target
from qvdjax.kernels.rounding_tpu import codes_of, largest_code
from qvdjax.numerics import QTensor, Quantizer

LANES, ROWS = 128, 32  # what an array of int8 is tiled by
COLUMNS = 512  # of a block of tokens that are rounded at a time: 16 registers
CHUNK = 2048  # of the contraction, that is multiplied at a time
MEMORY = 40 * 2**20  # bytes of a chip's own memory for one step's blocks, where no table says
COMPILER_MEMORY = 16 * 2**20  # beside them, for what the compiler keeps
TOKEN_BLOCKS, OUTPUT_BLOCKS = (1024, 512, 256, 128), (1024, 512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How the work is cut: tokens and output channels of a step, and inputs that are multiplied at a time."""

    tokens: int
    outputs: int
    chunk: int


def fused_refusal(x, weight: QTensor, activation: Quantizer, gate, device: Device) -> str | None:
    """Why the kernel cannot take these (see `quantized_linear`); None where it can. Looks at no values."""
    row = tuning.settings("quantized_matmul", device) or {}
    floating = weight.grid.floating
    if floating != activation.grid.floating:
        return "one side is integers, the other float8"
    if not floating and not row.get("integer_products", True):
        return f"{device.kind} has no products of integers"
    if floating and "float8_reason" in row:
        return f"{device.kind} has no products of float8"
    mesh = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Auto in mesh.axis_types and mesh.size > 1:
        return "the compiler cannot split a kernel over a mesh"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"it takes bfloat16 and float32, not {jnp.dtype(x.dtype).name}"
    if not (activation.dynamic and activation.symmetric and activation.granularity == "token"):
        return "it rounds with one dynamic symmetric range a token"
    if activation.range_method != "minmax" or not (floating or activation.codebook is weight.codebook is None):
        return "it knows even grids and ranges that cover every value"
    if weight.zero_point is not None:
        return "it knows no zero points of weights"
    if weight.codes.ndim != 2:
        return "it takes one weight, not a stack"
    outputs, inputs = weight.shape
    size = inputs // weight.groups
    if size % LANES or outputs % LANES:
        return f"{outputs} x {inputs} in groups of {size} are no multiples of {LANES}"
    if gate is not None and (gate.ndim != x.ndim or x.ndim > 3):
        return "a gate is [batch, tokens, outputs] or broadcast to it"
    if _blocks(x, weight, device) is None:
        return f"a block of {inputs} inputs does not fit the chip's own memory"
    return None


def fused_linear(
    x: jax.Array, weight: QTensor, activation: Quantizer, *, bias: jax.Array | None = None,
    gate: jax.Array | None = None, residual: jax.Array | None = None, dtype=None, interpret: bool = False,
    blocks: Blocks | None = None,
) -> jax.Array:  # fmt: skip
    """See `quantized_linear` for everything but these.

    Args:
        interpret: Run the kernel's arithmetic on any device, slowly (for tests).
        blocks: In the place of those that suit the device.
    """
    blocks = blocks or _blocks(x, weight, target())
    leading, outputs = x.shape[:-1], weight.shape[0]
    batch = leading[0] if len(leading) > 1 else 1
    # [..., tokens, features] -> [batch, tokens, features]: a gate may differ from sample to sample.
    x, residual = (None if a is None else a.reshape(batch, -1, a.shape[-1]) for a in (x, residual))
    if gate is not None:
        gate = gate.reshape(-1, *gate.shape[-2:])  # [batch or 1, tokens or 1, outputs or 1]
        gate = jnp.broadcast_to(gate, (batch, gate.shape[1], outputs))
    dtype = x.dtype if dtype is None else dtype
    limit = _limit(target(), weight) + COMPILER_MEMORY
    y = _call(x, weight, bias, gate, residual, activation.bits, dtype, blocks, limit, interpret)
    return y.reshape(*leading, outputs)


def _limit(device: Device, weight: QTensor) -> int:
    row = tuning.settings("quantized_linear", device, inputs=weight.shape[1], outputs=weight.shape[0]) or {}
    return row.get("memory_bytes", MEMORY)


def _blocks(x, weight: QTensor, device: Device) -> Blocks | None:
    """The largest that fit; None where the smallest do not."""
    outputs, inputs = weight.shape
    limit = _limit(device, weight)
    chunk = (
        inputs // weight.groups
        if weight.groups > 1
        else next(c for c in range(min(CHUNK, inputs), 0, -LANES) if inputs % c == 0)
    )
    for rows in TOKEN_BLOCKS:
        for columns in OUTPUT_BLOCKS:
            if outputs % columns == 0 and _memory(rows, columns, chunk, inputs, x.dtype, weight) <= limit:
                return Blocks(rows, columns, chunk)
    return None


def _memory(rows: int, columns: int, chunk: int, inputs: int, dtype, weight: QTensor) -> int:
    """Bytes of a step's blocks: those that are read and written lie there twice, so that the next is fetched
    meanwhile."""
    read = rows * inputs * jnp.dtype(dtype).itemsize + columns * inputs * _held_bits(weight) // 8
    written = 2 * rows * columns * 4  # residual and result, float32 at most
    return 2 * (read + written) + rows * inputs + columns * chunk + 3 * rows * columns * 4


def _held_bits(weight: QTensor) -> int:
    return 4 if weight.codes.dtype == jnp.int4 else 8


def _call(x, weight: QTensor, bias, gate, residual, bits: int, dtype, blocks: Blocks, limit: int, interpret: bool):
    """x [batch, tokens, inputs], gate [batch, tokens or 1, outputs], residual [batch, tokens, outputs]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    (batch, tokens, inputs), (outputs, _) = x.shape, weight.shape
    # A block may be as long as the array, or else whole tiles.
    rows, columns = min(blocks.tokens, tokens), blocks.outputs
    scale = jnp.broadcast_to(weight.scale.astype(jnp.float32), (outputs, weight.groups)).T  # [groups, outputs]
    token, channel = lambda b, i, j: (b, i, 0), lambda b, i, j: (j, 0)
    floating = weight.grid.floating
    operands = {"x": x, "codes": weight.codes, "scale": scale}
    specs = {
        "x": pl.BlockSpec((None, rows, inputs), token),
        "codes": pl.BlockSpec((columns, inputs), channel),
        "scale": pl.BlockSpec((weight.groups, columns), lambda b, i, j: (0, j)),
    }
    if bias is not None:
        operands["bias"] = bias.astype(jnp.float32)[None]
        specs["bias"] = pl.BlockSpec((1, columns), lambda b, i, j: (0, j))
    if gate is not None:
        operands["gate"] = gate
        one = gate.shape[1] == 1
        specs["gate"] = pl.BlockSpec((None, 1 if one else rows, columns), lambda b, i, j: (b, 0 if one else i, j))
    if residual is not None:
        operands["residual"] = residual
        specs["residual"] = pl.BlockSpec((None, rows, columns), lambda b, i, j: (b, i, j))
    kernel = functools.partial(_kernel, tuple(operands), bits=bits, chunk=blocks.chunk, grouped=weight.groups > 1)
    written = x.size // inputs * outputs * jnp.dtype(dtype).itemsize
    return pl.pallas_call(
        kernel,
        grid=(batch, pl.cdiv(tokens, rows), outputs // columns),
        in_specs=list(specs.values()),
        out_specs=pl.BlockSpec((None, rows, columns), lambda b, i, j: (b, i, j)),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, outputs), dtype),
        scratch_shapes=[
            # Codes of the tokens.
            pltpu.VMEM((-(-rows // ROWS) * ROWS, inputs), jnp.float8_e4m3fn if floating else jnp.int8),
            pltpu.VMEM((-(-rows // ROWS) * ROWS, 1), jnp.float32),  # their scales
            pltpu.VMEM((rows, columns), jnp.float32 if floating or weight.groups > 1 else jnp.int32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=limit,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * tokens * inputs * outputs, transcendentals=0,
            bytes_accessed=x.nbytes + written + pl.cdiv(batch * tokens, rows) * outputs * inputs * weight.bits // 8,
        ),
        interpret=interpret,
        name="quantized_linear",
    )(*operands.values())  # fmt: skip


def _kernel(names, *refs, bits: int, chunk: int, grouped: bool):
    """One block of tokens [rows, inputs] by one of output channels [columns, inputs]."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    ref = dict(zip(names, refs))
    out_ref, codes_ref, token_scale_ref, sum_ref = refs[len(names) :]
    inputs = ref["x"].shape[1]
    pl.when(pl.program_id(2) == 0)(lambda: _round(ref["x"], codes_ref, token_scale_ref, bits))
    sum_ref[...] = jnp.zeros_like(sum_ref)
    rows = sum_ref.shape[0]

    def add(part, _):
        here = pl.ds(pl.multiple_of(part * chunk, LANES), chunk)
        codes, kind = ref["codes"][:, here].astype(jnp.int8), jnp.int32
        if codes_ref.dtype != jnp.int8:  # as in XLA this is a copy, the bits are read as float8 here
            codes, kind = pltpu.bitcast(codes, codes_ref.dtype), jnp.float32
        product = jax.lax.dot_general(
            codes_ref[:rows, here], codes, (((1,), (1,)), ((), ())), preferred_element_type=kind
        )
        if grouped:
            product = product.astype(jnp.float32) * ref["scale"][pl.ds(part, 1), :]
        sum_ref[...] += product

    jax.lax.fori_loop(0, inputs // chunk, add, None)
    y = sum_ref[...] if grouped else sum_ref[...].astype(jnp.float32) * ref["scale"][...]
    y = y * token_scale_ref[:rows]
    if "bias" in ref:
        y = y + ref["bias"][...]
    if "gate" in ref:
        y = y * ref["gate"][...].astype(jnp.float32)
    if "residual" in ref:
        y = y + ref["residual"][...].astype(jnp.float32)
    out_ref[...] = y.astype(out_ref.dtype)


def _round(x_ref, codes_ref, scale_ref, bits: int):
    """Ranges and codes of all tokens of a block, some rows and columns at a time so that they stay in registers."""
    from jax.experimental import pallas as pl

    high, (rows, inputs) = largest_code(bits, codes_ref.dtype), x_ref.shape
    size = min(ROWS, rows)
    parts = [(start, min(COLUMNS, inputs - start)) for start in range(0, inputs, COLUMNS)]

    def round_rows(start, size):
        here = pl.ds(start, size)
        read = lambda place, width: x_ref[here, place : place + width].astype(jnp.float32)  # noqa: E731
        largest, nothing = jnp.zeros((size, 1), jnp.float32), jnp.zeros((size, 1), jnp.float32)
        for part in parts:
            largest = jnp.maximum(largest, jnp.max(jnp.abs(read(*part)), axis=-1, keepdims=True))
            nothing = nothing + jnp.sum(0 * read(*part), axis=-1, keepdims=True)
        # Zero, or NaN where the row has one, whatever its largest is said to be: the row becomes NaN.
        scale = jnp.where(largest > 0, largest / high, 1) + nothing
        scale_ref[here, :] = scale
        for place, width in parts:
            codes_ref[here, place : place + width] = codes_of(read(place, width) / scale, bits, codes_ref.dtype)

    def step(i, _):
        round_rows(pl.multiple_of(i * size, size), size)

    jax.lax.fori_loop(0, rows // size, step, None)
    if rows % size:  # a block as long as the array, of no whole tiles
        round_rows(rows // size * size, rows % size)
