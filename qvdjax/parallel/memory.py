"""The memory of devices: what a program holds of it, and giving it back at once."""

from typing import Any

import jax


def bytes_held(compiled: jax.stages.Compiled) -> int | None:
    """What a compiled program holds of one device: arguments + temporaries + outputs - aliased; None where the backend
    says nothing."""
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    parts = (memory.argument_size_in_bytes, memory.temp_size_in_bytes, memory.output_size_in_bytes)
    return sum(parts) - memory.alias_size_in_bytes


def free(tree: Any) -> None:
    """Give back at once what the arrays of a module or a tree hold, which are of no use then."""
    for array in jax.tree.leaves(tree):
        array.delete()
