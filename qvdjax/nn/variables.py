"""Kinds of array that a module holds beside trained parameters, and how layers are found in a tree of modules."""

import functools
from collections.abc import Iterator

from flax import nnx

Param = nnx.Param


class Buffer(nnx.Variable):
    """An array that belongs to a checkpoint and is never trained, as PyTorch has them. Metadata: `axes`."""


class Codes(nnx.Variable):
    """Integer codes of a weight; never differentiated. Metadata: `axes` (one layer's logical axis names), `bits`."""


class Scale(nnx.Variable):
    """Scales, zero points and other float32 parameters of a quantizer. Metadata: `axes`."""


class Table(nnx.Variable):
    """Outputs of a layer, computed beforehand; never trained. Metadata: `axes`."""


class Statistic(nnx.Variable):
    """A number recorded about a layer (a range seen, a signal-to-noise ratio). Metadata: `axes`."""


def shape_of(variable: nnx.Variable) -> tuple[int, ...]:
    """Shape, also of a variable of an abstract module, which cannot be subscripted."""
    return variable.get_value().shape


def leading_shape(variable: nnx.Variable) -> tuple[int, ...]:
    """What its shape has before the axes it names: (layers,) in a stack, () outside."""
    shape = shape_of(variable)
    return shape[: len(shape) - len(variable.get_metadata("axes"))]


def own_shape(variable: nnx.Variable) -> tuple[int, ...]:
    """Shape of one block's part of it."""
    return shape_of(variable)[len(leading_shape(variable)) :]


def at(root: nnx.Module, path: tuple) -> nnx.Module:
    """The module at a path of attribute names and list indices."""
    step = lambda node, name: node[name] if isinstance(name, int) else getattr(node, name)  # noqa: E731
    return functools.reduce(step, path, root)


def replace(root: nnx.Module, path: tuple, new: nnx.Module) -> None:
    """Put `new` at a path, in place."""
    parent = at(root, path[:-1])
    if isinstance(path[-1], int):
        parent[path[-1]] = new
    else:
        setattr(parent, path[-1], new)


def shallow_copy(module: nnx.Module) -> nnx.Module:
    """Other modules around the same Variables: attributes may be set without a trace on the given module.

    A Variable that is written to changes in both; put another one in its place instead.
    """
    return nnx.merge(*nnx.split(module))


def dotted(path: tuple) -> str:
    """A path as diffusers spells it."""
    return ".".join(map(str, path))


def iterate(root: nnx.Module, kind: type) -> Iterator[tuple[tuple, nnx.Module]]:
    """All modules of a kind with their paths, as a list first, so that they may be replaced on the way."""
    found = [(tuple(path), module) for path, module in nnx.iter_modules(root) if isinstance(module, kind)]
    yield from sorted(found, key=lambda item: [str(part) for part in item[0]])
