"""What is compiled for blocks, and let go again: blocks of a UNet are all different programs."""

from collections.abc import Callable, Sequence

import jax
from flax import nnx

KEPT = 8  # kinds of blocks whose programs are held at a time


class Programs:
    """Jitted functions that are called with blocks.

    Every program of XLA's for CPUs takes tens of the 65,530 regions of memory that Linux gives a process. A transformer
    has one or two kinds of blocks, and theirs are never let go.
    """

    def __init__(self, functions: Sequence[Callable]):
        self.functions, self.kinds = tuple(functions), set()

    def enter(self, block: nnx.Module) -> None:
        """Say that a block is next: where it is of one kind too many, all that was compiled before is let go."""
        arrays, structure = jax.tree.flatten(block)
        kind = (structure, tuple((array.shape, array.dtype) for array in arrays))
        if kind not in self.kinds and len(self.kinds) == KEPT:
            for function in self.functions:
                function.clear_cache()
            self.kinds.clear()
        self.kinds.add(kind)
