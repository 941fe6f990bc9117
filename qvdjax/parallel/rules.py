"""One table from the logical axis names of parameters and activations to mesh axes, and what follows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

Rules = Mapping[str, tuple[str, ...]]

RULES: Rules = {
    # Parameters. Every weight has one axis spread over fsdp and context, which is gathered before its product
    # (stored codes travel as int8 or int4), and at most one split over tensor, which is never gathered.
    "embed": ("fsdp", "context"),
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "context": (),  # the width of the text embeddings: the other axis of its one weight is split
    # Activations. `tokens` is the stream between layers; inside attention every token meets every other, so
    # tokens are whole there and `attention_heads` splits instead (the all-to-all of Ulysses, arXiv
    # 2309.14509).
    "batch": ("data", "fsdp"),
    "tokens": ("context",),
    "attention_heads": ("tensor", "context"),
}


def partition_spec(
    shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: Rules = RULES
) -> tuple[PartitionSpec, dict[int, tuple[str, ...]]]:
    """Where each dimension of an array goes.

    Names are right-aligned: a leading layer axis has none and stays whole. A mesh axis serves the first
    dimension that asks for it, and only as long as it divides that dimension.

    Returns:
        The spec, and for each dimension that had to do without some mesh axes of size above one, those axes.

    Raises:
        ValueError: More names than dimensions, or a name that `rules` does not know.
    """
    if len(axes) > len(shape):
        raise ValueError(f"{len(axes)} axis names {tuple(axes)} for an array of shape {tuple(shape)}")
    names = (None,) * (len(shape) - len(axes)) + tuple(axes)
    used: set[str] = set()
    entries, refused = [], {}
    for dimension, (size, name) in enumerate(zip(shape, names, strict=True)):
        if name is not None and name not in rules:
            raise ValueError(f"no rule for the axis {name!r}; rules know {', '.join(rules)}")
        free = [m for m in rules.get(name, ()) if m not in used and mesh.shape.get(m, 1) > 1]
        taken: list[str] = []
        for mesh_axis in free:
            if size % math.prod(mesh.shape[m] for m in (*taken, mesh_axis)) == 0:
                taken.append(mesh_axis)
        used.update(taken)
        if len(taken) < len(free):
            refused[dimension] = tuple(m for m in free if m not in taken)
        entries.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*entries), refused


def shardings(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The tree with a NamedSharding in the place of every array.

    Variables go where their `axes` metadata says (one layer's logical names); other arrays are replicated.
    Works on modules and states, concrete or abstract; the result serves `device_put`, `in_shardings` and
    `out_shardings`.
    """

    def one(leaf):
        if isinstance(leaf, nnx.Variable):
            spec, _ = partition_spec(leaf.get_value().shape, leaf.get_metadata().get("axes", ()), mesh, rules)
            return leaf.replace(NamedSharding(mesh, spec))
        return NamedSharding(mesh, PartitionSpec())

    return jax.tree.map(one, tree, is_leaf=_is_variable)


def left_whole(tree: Any, mesh: Mesh, rules: Rules = RULES) -> list[dict]:
    """What the rules would split and this mesh cannot, because a mesh axis does not divide the dimension.

    Returns:
        One row for each dimension: `path` (dotted), `axis` (logical name), `size`, `mesh_axes` it does
        without.
    """
    rows = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        if not isinstance(leaf, nnx.Variable):
            continue
        shape, axes = leaf.get_value().shape, leaf.get_metadata().get("axes", ())
        _, refused = partition_spec(shape, axes, mesh, rules)
        names = (None,) * (len(shape) - len(axes)) + tuple(axes)
        for dimension, mesh_axes in refused.items():
            row = {"path": _dotted(path), "axis": names[dimension], "size": shape[dimension]}
            rows.append({**row, "mesh_axes": mesh_axes})
    return rows


def place(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Put a module or state on the mesh, as `shardings` says."""
    return jax.device_put(tree, shardings(tree, mesh, rules))


def abstract(tree: Any, mesh: Mesh, rules: Rules = RULES) -> Any:
    """The tree with a ShapeDtypeStruct, sharded as `shardings` says, in the place of every array."""
    describe = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)  # noqa: E731
    return jax.tree.map(describe, tree, shardings(tree, mesh, rules))


def constrain(x: jax.Array, *axes: str | None, rules: Rules = RULES) -> jax.Array:
    """Pin the sharding of an activation by the logical names of its (last) axes; does nothing without a mesh.

    The mesh is the one in scope (`jax.set_mesh`). Inside `shard_map` the axes it handles itself are left
    alone.
    """
    mesh, automatic = _in_scope()
    # On one device a pin says nothing, and yet the compiler keeps an array in the shape that is pinned.
    if math.prod(mesh.shape[name] for name in automatic) == 1:
        return x
    spec, _ = partition_spec(x.shape, axes, mesh, _following(rules, automatic))
    return jax.lax.with_sharding_constraint(x, spec)


def parts(size: int, axis: str, rules: Rules = RULES) -> int:
    """By how many devices of the mesh in scope an activation's axis of this size is split, where `constrain` pins it;
    1 without a mesh."""
    mesh, automatic = _in_scope()
    taken = partition_spec((size,), (axis,), mesh, _following(rules, automatic))[0][0]
    return math.prod(mesh.shape[name] for name in ((taken,) if isinstance(taken, str) else taken or ()))


def _in_scope() -> tuple[AbstractMesh, set[str]]:
    """The mesh in scope, without axes where there is none, and those of its axes that the compiler splits along."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh, {name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Auto}


def _following(rules: Rules, mesh_axes: set[str]) -> Rules:
    """Rules that know of some mesh axes alone."""
    return {name: tuple(m for m in wanted if m in mesh_axes) for name, wanted in rules.items()}


def process_rows(count: int, mesh: Mesh, rules: Rules = RULES) -> np.ndarray:
    """Which rows of a batch of `count` the devices of this process hold, ascending; all of them for one process.

    Processes share rows where the mesh splits something else between them: on `tensor=4` each of four devices takes
    part in every row.
    """
    numbers = np.arange(count)
    held = _batch_sharding(count, mesh, rules).addressable_devices_indices_map((count,))
    return np.unique(np.concatenate([numbers[index] for index in held.values()]))


def shard_batch(tree: Any, mesh: Mesh, rules: Rules = RULES, *, count: int | None = None) -> Any:
    """Put arrays whose first axis is the batch on the mesh; a batch that does not divide is kept whole.

    Args:
        tree: Arrays of the batch's rows; with several processes, of those that `process_rows` names to this one.
        mesh: Where they go.
        rules: From axis names to mesh axes.
        count: Rows of the whole batch; by default those given, which is right for one process.
    """

    def one(leaf):
        rows = len(leaf) if count is None else count
        sharding = _batch_sharding(rows, mesh, rules)
        if jax.process_count() == 1:
            return jax.device_put(leaf, sharding)
        held = process_rows(rows, mesh, rules)
        if len(leaf) != len(held):
            raise ValueError(f"{len(leaf)} rows are given, and of {rows} this process holds {len(held)}")
        numbers = np.arange(rows)

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return np.asarray(leaf[np.searchsorted(held, numbers[index[0]])])

        return jax.make_array_from_callback((rows, *leaf.shape[1:]), sharding, shard)

    return jax.tree.map(one, tree)


def _batch_sharding(count: int, mesh: Mesh, rules: Rules) -> NamedSharding:
    spec, _ = partition_spec((count,), ("batch",), mesh, rules)
    return NamedSharding(mesh, spec)


def _is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)


def _dotted(path) -> str:
    return ".".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)
