"""How much faster faster linear layers can make a whole model: Amdahl's law over counted operations."""

import math
from collections import Counter
from pathlib import Path

import jax
import numpy as np

import models
from experiments.evaluation.setup import Setup
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.diffusion.guidance import of_branch


def speed_ceiling_of_folder(folder: Path, setup: Setup) -> dict:
    """`speed_ceiling` of a model folder's architecture, at the size and prompt length of `setup`."""
    model = models.abstract(CheckpointFolder.open(folder).config)
    shapes = ((1, *setup.latents_shape), (1,), (1, *setup.context.shape[1:]))
    inputs = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    own = of_branch(setup.conditions, negative=False)
    conditions = {name: jax.ShapeDtypeStruct((1, *array.shape[1:]), np.float32) for name, array in own.items()}
    return speed_ceiling(count_operations(model, *inputs, **conditions))


def count_operations(model, latents, timestep, context, **conditions) -> Counter:
    """Floating-point operations of one forward pass, by kind.

    Counted in the traced program, so it holds for any model and any way to compute attention: a product of
    two activations is attention (queries times keys, probabilities times values), a product of activations
    and parameters is a linear layer. Element-wise work is not counted.

    Args:
        model: A module, abstract or not; the other arguments are arrays or `jax.ShapeDtypeStruct`s as it
            takes.

    Returns:
        {"linear": n, "attention": n, "convolution": n}, a multiplication and an addition counted as two.
    """
    parameters = jax.tree.leaves(model)
    call = lambda model, inputs, conditions: model(*inputs, **conditions)  # noqa: E731
    program = jax.make_jaxpr(call)(model, (latents, timestep, context), conditions)
    inputs = len(program.jaxpr.invars) - len(parameters)
    return _count(program.jaxpr, [False] * len(parameters) + [True] * inputs)[0]


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


def _count(program, activations: list[bool]) -> tuple[Counter, list[bool]]:
    """Operations of a traced program.

    Args:
        program: A Jaxpr.
        activations: Which of its arguments depend on the model's inputs; the others are parameters.

    Returns:
        The operations, and which of the results depend on the model's inputs.
    """
    total: Counter = Counter()
    depends = dict(zip(program.invars, activations, strict=True))
    for equation in program.eqns:
        flags = [not hasattr(v, "val") and depends.get(v, False) for v in equation.invars]  # literals have `val`
        name, parameters = equation.primitive.name, equation.params
        size = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        results = [any(flags)] * len(equation.outvars)
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            terms = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total["attention" if all(flags) else "linear"] += 2 * size * terms
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            total["convolution"] += 2 * size * math.prod(kernel) // outputs
        elif name == "dot_product_attention_fwd_wrapper":  # cuDNN: (batch, tokens, heads, head_dim)
            query, key = (variable.aval.shape for variable in equation.invars[:2])
            total["attention"] += 4 * math.prod(query) * key[1]
        elif name == "scan":
            inner, results = _count_scan(parameters, flags)
            total += inner
        else:
            for body in _programs(parameters):
                fits = len(body.invars) == len(flags)
                inner, outcome = _count(body, flags if fits else [any(flags)] * len(body.invars))
                total += inner
                results = outcome if len(outcome) == len(results) else results
        depends.update(zip(equation.outvars, results, strict=True))
    return total, [not hasattr(v, "val") and depends.get(v, False) for v in program.outvars]


def _count_scan(parameters, flags: list[bool]) -> tuple[Counter, list[bool]]:
    body, constants, carried = parameters["jaxpr"].jaxpr, parameters["num_consts"], parameters["num_carry"]
    while True:
        once, results = _count(body, flags)
        carry = [a or b for a, b in zip(flags[constants : constants + carried], results, strict=False)]
        if carry == flags[constants : constants + carried]:
            return Counter({kind: parameters["length"] * n for kind, n in once.items()}), results
        # What depends on the inputs after one round does so in the next one from the start.
        flags = [*flags[:constants], *carry, *flags[constants + carried :]]


def _programs(parameters) -> list:
    """The Jaxprs among an equation's parameters; of a condition's branches the longest."""
    branches = parameters.get("branches")
    if branches:
        return [max((branch.jaxpr for branch in branches), key=lambda program: len(program.eqns))]
    found = [value for value in parameters.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]
    return [getattr(value, "jaxpr", value) for value in found]
