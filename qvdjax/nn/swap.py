"""Swapping layers by decision: one decision a layer and block, stacks cut into segments where neighbours differ."""

import itertools
from collections.abc import Callable, Hashable, Mapping

import jax
from flax import nnx

from qvdjax.nn.layers import FLOAT_LAYERS
from qvdjax.nn.protocol import Stack, VideoModel
from qvdjax.nn.variables import dotted, iterate, replace

Make = Callable[[nnx.Module, Hashable, list[str]], nnx.Module]
"""(layer, its decision, its names in diffusers: one a block) -> what takes its place."""


def swap_layers(model: VideoModel, decisions: Mapping[str, Hashable], make: Make) -> VideoModel:
    """A model in which every layer with a decision is what `make` returns; the given model is left as it is.

    Args:
        model: A float model; abstract ones work under `jax.eval_shape`.
        decisions: Name in diffusers -> decision. Layers without one stay as they are.
        make: May return the layer itself, changed.
    """
    model = nnx.clone(model)
    for path, layer in iterate(model, FLOAT_LAYERS):
        if path[0] != "stacks" and dotted(path) in decisions:
            replace(model, path, make(layer, decisions[dotted(path)], [dotted(path)]))
    model.stacks = nnx.List([part for stack in model.stacks for part in _segments(stack, decisions, make)])
    return model


def _segments(stack: Stack, decisions: Mapping[str, Hashable], make: Make) -> list[Stack]:
    """The stack cut where decisions change, each part with its layers in place."""
    names = {path: stack.names(path) for path, _ in iterate(stack.block, FLOAT_LAYERS)}
    plans = [tuple(decisions.get(rows[i]) for rows in names.values()) for i in range(stack.count or 1)]
    parts = []
    for _, group in itertools.groupby(range(len(plans)), key=plans.__getitem__):
        numbers = list(group)
        rows = slice(numbers[0], numbers[-1] + 1)
        # Slicing copies, so a stack that stays whole is not sliced.
        block = stack.block if len(numbers) == len(plans) else jax.tree.map(lambda a, rows=rows: a[rows], stack.block)
        for path, layer in iterate(block, FLOAT_LAYERS):
            decision = decisions.get(names[path][rows][0])
            if decision is not None:
                replace(block, path, make(layer, decision, names[path][rows]))
        count = None if stack.count is None else len(numbers)
        parts.append(Stack(block, prefix=stack.prefix, start=stack.start + rows.start, count=count))
    return parts
