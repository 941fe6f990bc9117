"""Attention kernels under a mesh: heads are split, and every device attends to all tokens of its heads."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, PartitionSpec

from qvdjax.parallel.rules import partition_spec


def over_heads(
    attend: Callable, query: jax.Array, key: jax.Array, value: jax.Array, key_lengths: jax.Array | None = None
) -> jax.Array:
    """`attend(query, key, value[, key_lengths])` on every device of the mesh in scope, on the heads it holds.

    Heads are split as the rule `attention_heads` says. Callers that keep tokens split pin query, key and value to
    tokens first, and XLA exchanges heads for tokens (all-to-all). Without a mesh, and inside a caller's own
    `shard_map`, the arrays are a device's own.

    Args:
        query: [batch, queries, heads, head_dim].
        key, value: [batch, keys, heads, head_dim].
        key_lengths: [batch], or None.

    Returns:
        Like query.
    """
    mesh = jax.sharding.get_abstract_mesh()
    arrays = (query, key, value) if key_lengths is None else (query, key, value, key_lengths)
    if AxisType.Auto not in mesh.axis_types:
        return attend(*arrays)
    axes = ("batch", None, "attention_heads", None)
    spec: PartitionSpec = partition_spec(query.shape, axes, mesh)[0]
    specs = (spec, spec, spec, PartitionSpec(spec[0]))[: len(arrays)]
    # A kernel says nothing about which outputs vary over which axes, so that check is off.
    return jax.shard_map(attend, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)
