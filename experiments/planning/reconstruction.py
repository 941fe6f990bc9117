"""One step of block reconstruction of a model that is only described: what `qvdjax quantize` runs for every block."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import models
from qvdjax import parallel
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear
from qvdjax.nn.partial_block import make, read
from qvdjax.nn.variables import dotted, iterate, own_shape
from qvdjax.ptq.reconstruction.examples import Examples, without_blocks
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.training import prepared, start, train
from qvdjax.recipes import Recipe, decide

STEPS = 600  # of a block: fifteen epochs of forty examples


def planned_reconstruction(config: dict, recipe: Recipe, mesh: Mesh, inputs: dict) -> tuple[Any, tuple, Any, int]:
    """The step that trains the first block, as the recipe does, on one example.

    Args:
        config: Fields of config.json.
        recipe: One that reconstructs.
        mesh: Where everything lies.
        inputs: Keyword arguments of the model's call, as ShapeDtypeStructs placed on the mesh.

    Returns:
        The function, its abstract arguments, the whole model's abstract parameters, and the bytes of these on one chip
        that are no arguments: the other blocks, which wait.

    Raises:
        UserError: The recipe reconstructs nothing, or all blocks together.
    """
    plan = recipe.reconstruction
    if plan is None:
        raise UserError(f"{recipe.name} reconstructs no blocks", remedy="choose one that does, such as flatquant")
    if plan.scope == "model":
        raise UserError("a step of one block is planned, not of all together", remedy="plan with --set scope=block")
    model = jax.eval_shape(lambda: models.build(config, dtype=jnp.bfloat16))
    schemes = decide(model, recipe).schemes
    stack = model.stacks[0]
    names = {dotted(path): stack.names(path)[0] for path, _ in iterate(stack.block, (Linear, Conv))}

    def parts():
        whole = models.build(config, dtype=jnp.bfloat16)
        block = whole.stacks[0].layer(0)
        layers = iterate(block, (Linear, Conv))
        known = {dotted(p): Known(ranges=(jnp.zeros(own_shape(layer.weight)[1]),) * 2) for p, layer in layers}
        own = {path: _of_one_range(schemes[name]) for path, name in names.items()}
        student = prepared(block, own, recipe.transform, known, plan)
        return student, without_blocks(whole), start(student, plan=plan, steps=STEPS)

    def lead(array, *axes):
        """With a leading axis of one example."""
        shape = (1, *array.shape)
        spec, _ = parallel.partition_spec(shape, axes, mesh)
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=NamedSharding(mesh, spec))

    student, outer, state = jax.eval_shape(parts)
    stream, conditioning = jax.eval_shape(lambda outer, inputs: outer.embed(**inputs), outer, inputs)
    part = jax.eval_shape(lambda block, stream: read(block, stream), student, stream)
    target = jax.eval_shape(lambda stack, *given: make(stack.layer(0), *given), stack, part, conditioning)

    def spread(array, axes):
        """As the stream: tokens lie apart, whole videos of UNets too."""
        return lead(array, "batch", *axes[: array.ndim - 1], *(None,) * (array.ndim - 1 - len(axes)))

    along = ("tokens",) if isinstance(stream, jax.ShapeDtypeStruct) else ()
    whole_inputs = {name: spread(a, ()) for name, a in inputs.items()}
    parts, targets = (tuple(spread(a, along) for a in arrays) for arrays in (part, target))
    weights = tuple(spread(jax.ShapeDtypeStruct(a.shape[:-1], jnp.float32), along) for a in target)
    examples = Examples(whole_inputs, parts, targets, weights)
    change = jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec()))
    arguments = (*(parallel.abstract(part, mesh) for part in (state, student, outer)), examples, change)
    whole = parallel.abstract(model, mesh)
    waiting = (
        _bytes(whole)
        - _bytes(arguments[2])
        - _bytes(parallel.abstract(jax.eval_shape(lambda stack: stack.layer(0), stack), mesh))
    )
    function = jax.jit(functools.partial(train, plan=plan, steps=STEPS), donate_argnums=0)
    return function, arguments, whole, waiting


def _of_one_range(scheme: LayerScheme) -> LayerScheme:
    """The scheme without ranges of frames or timesteps, which calibration counts: they are a few numbers."""
    activation = scheme.activation
    if activation is None or activation.granularity not in ("frame", "step"):
        return scheme
    return dataclasses.replace(scheme, activation=dataclasses.replace(activation, granularity="tensor"))


def _bytes(tree: Any) -> int:
    """Of one chip."""
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))
