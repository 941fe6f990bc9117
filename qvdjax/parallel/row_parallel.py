"""Quantized products whose contraction is split over devices, with the same integers as on one device."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from qvdjax.kernels.quantized_matmul import contract_integers, quantized_matmul
from qvdjax.numerics import QTensor, Quantizer, encode
from qvdjax.parallel.rules import partition_spec


def row_parallel(
    x: jax.Array,
    weight: QTensor,
    activation: Quantizer,
    *,
    axis: str = "tensor",
    keep_integers: bool = False,
) -> jax.Array:
    """x [batch, tokens, in] times weight [out, in], both split along `in` over the mesh axis `axis`.

    Each device takes its own part's range, one `pmax` a token makes it the range of the whole row, and so the
    codes do not depend on the number of devices (a local range would differ by 0.7 % after one layer). Runs
    under the mesh in scope (`jax.set_mesh`).

    Args:
        x: Float activations; batch and tokens may be split as the rules say.
        weight: Codes split along `in`; one range a tensor or output channel.
        activation: Dynamic range, one a token or one a sample (granularity "tensor").
        keep_integers: Sum the int32 products over devices and scale afterwards: equal to one device bit
            for bit, at the cost of four bytes an element in the exchange. By default the scaled products are
            summed in x's type (on TPU also where the sum is written in float32): equal to the last bits.

    Returns:
        [batch, tokens, out] in x's type, whole along `out`.

    Raises:
        ValueError: Ranges in groups, or kept integers with zero points.
    """
    if weight.groups != 1 or activation.granularity not in ("token", "tensor"):
        raise ValueError("a row-parallel product takes one range along the contraction: no groups")
    if activation.codebook is not None or weight.codebook is not None:
        raise ValueError("a row-parallel product has no codebooks: their scale is no largest value")
    if keep_integers and not (activation.symmetric and weight.zero_point is None):
        raise ValueError("only symmetric codes are summed as integers; leave keep_integers off")

    spec, _ = partition_spec(x.shape, ("batch", "tokens", None), jax.sharding.get_abstract_mesh())
    batch, tokens, _ = spec
    token_axes = (tokens,) if isinstance(tokens, str) else tokens or ()

    def local(x, codes, scale, zero_point):
        # The range of the whole row from those of its parts; pmax has no gradient rule.
        low, high = (jax.lax.stop_gradient(r) for r in activation.range_of(x.astype(jnp.float32)))
        over = (axis, *token_axes) if activation.granularity == "tensor" else axis
        low, high = jax.lax.pmin(low, over), jax.lax.pmax(high, over)
        codes_x = encode(x.astype(jnp.float32), activation.grid, *activation.grid.from_range(low, high), jnp.int8)
        part = QTensor(codes, scale, zero_point, weight.bits)
        if keep_integers:
            total = jax.lax.psum(contract_integers(codes_x.codes, codes), axis)  # int32 [batch, tokens, out]
            return (total.astype(jnp.float32) * codes_x.scale * scale[..., 0]).astype(x.dtype)
        # Zero points included, the product is a sum over the contraction: parts add up.
        return jax.lax.psum(quantized_matmul(codes_x, part), axis).astype(x.dtype)

    run = functools.partial(
        jax.shard_map,
        in_specs=(
            PartitionSpec(batch, tokens, axis),
            PartitionSpec(None, axis),
            PartitionSpec(),
            PartitionSpec(),
        ),
        out_specs=PartitionSpec(batch, tokens, None),
    )
    return run(local)(x, weight.codes, weight.scale, weight.zero_point)
