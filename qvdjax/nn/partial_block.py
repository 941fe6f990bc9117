"""Blocks that read and change a part of a stream of several arrays, such as those of a UNet with skip connections."""

from typing import Any, Self

import jax
from flax import nnx

Arrays = tuple[Any, ...]


class PartialBlock(nnx.Module):
    """A block in three steps, so that who trains or keeps it can do without the part of a stream that only passes by.

    Subclasses write `read`, `make` and `put`; nothing but what `read` returns may have a say in what is made.
    """

    def read(self, stream: Any) -> tuple[jax.Array, ...]:
        """The arrays of a stream that the block computes with, the one that it changes first."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it reads")

    def make(self, part: tuple[jax.Array, ...], conditioning: Any) -> tuple[jax.Array, ...]:
        """What `read` gave -> the arrays that the block adds to the stream, each once."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it makes")

    def put(self, stream: Any, made: tuple[jax.Array, ...]) -> Any:
        """A stream and what `make` made of it -> the stream behind the block."""
        raise NotImplementedError(f"{type(self).__name__} does not say where to put what it makes")

    def __call__(self, stream: Any, conditioning: Any) -> Any:
        """The stream behind the block."""
        return self.put(stream, self.make(self.read(stream), conditioning))

    def unplaced(self) -> tuple[Self, dict[tuple, tuple]]:
        """The block under names that say nothing about where it stands, so that blocks of equal shape run in one
        program, and how paths in it begin: there -> here. It shares the arrays."""
        return self, {}


def read(block: nnx.Module, stream: Any) -> Arrays:
    """What a block, partial or not, computes with: see `PartialBlock`."""
    return block.read(stream) if isinstance(block, PartialBlock) else (stream,)


def make(block: nnx.Module, part: Arrays, conditioning: Any, **how: Any) -> Arrays:
    """What it makes of that; `how` are keyword arguments of the block's call."""
    if isinstance(block, PartialBlock):
        return block.make(part, conditioning, **how)
    return (block(*part, conditioning, **how),)


def put(block: nnx.Module, stream: Any, made: Arrays) -> Any:
    """The stream behind it."""
    return block.put(stream, made) if isinstance(block, PartialBlock) else made[0]
