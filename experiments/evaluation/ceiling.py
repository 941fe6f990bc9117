"""How much faster faster linear layers can make a whole model: Amdahl's law over counted operations."""

import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np

import models
from experiments.evaluation.setup import Setup
from qvdjax.checkpoint import CheckpointFolder


def speed_ceiling_of_folder(folder: Path, setup: Setup) -> dict:
    """`speed_ceiling` of a model folder's architecture, at the size and prompt length of `setup`."""
    model = models.abstract(CheckpointFolder.open(folder).config)
    shapes = ((1, *setup.latents_shape), (1,), (1, *setup.context.shape[1:]))
    return speed_ceiling(
        count_operations(model, *(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes))
    )


def count_operations(model, latents, timestep, context) -> Counter:
    """Floating-point operations of one forward pass, by kind.

    Counted in the traced program, so it holds for any model: a matrix product with batch axes is
    attention (queries times keys, probabilities times values), one without is a linear layer.
    Element-wise work is not counted.

    Args:
        model: A module, abstract or not; the other arguments are arrays or `jax.ShapeDtypeStruct`s as it
            takes.

    Returns:
        {"linear": n, "attention": n, "convolution": n}, a multiplication and an addition counted as two.
    """
    program = jax.make_jaxpr(lambda model, *arguments: model(*arguments))(model, latents, timestep, context)
    return _count(program.jaxpr)


def speed_ceiling(operations: Counter) -> dict:
    """Shares of the operations and the speed-up that quantized linear layers can reach at most.

    Returns:
        {linear_share, attention_share, convolution_share, ceiling, ceiling_int8}: `ceiling` if linear
        layers took no time at all, `ceiling_int8` if they ran twice as fast, the ratio of the int8 to the
        bf16 peak of most chips.
    """
    total = sum(operations.values())
    shares = {kind: operations[kind] / total for kind in ("linear", "attention", "convolution")}
    rest = 1 - shares["linear"]
    return {
        **{f"{kind}_share": share for kind, share in shares.items()},
        "ceiling": 1 / rest if rest > 0 else None,
        "ceiling_int8": 1 / (rest + shares["linear"] / 2),
    }


def _count(program) -> Counter:
    total = Counter(linear=0, attention=0, convolution=0)
    for equation in program.eqns:
        name = equation.primitive.name
        if name == "dot_general":
            (contracted, _), (batch, _) = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            operations = (
                2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
            )
            total["attention" if batch else "linear"] += operations
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            output_axis = equation.params["dimension_numbers"].rhs_spec[0]
            per_output = math.prod(kernel) // kernel[output_axis]
            total["convolution"] += 2 * math.prod(equation.outvars[0].aval.shape) * per_output
        elif name == "dot_product_attention_fwd_wrapper":  # cuDNN: (batch, tokens, heads, head_dim)
            query, key = (variable.aval.shape for variable in equation.invars[:2])
            total["attention"] += 4 * math.prod(query) * key[1]
        else:
            repeats = equation.params["length"] if name == "scan" else 1
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
                if _is_program(inner):
                    for kind, operations in _count(getattr(inner, "jaxpr", inner)).items():
                        total[kind] += repeats * operations
    return total


def _is_program(value) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
