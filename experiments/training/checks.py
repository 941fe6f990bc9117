"""What is refused before a training run reads a weight."""

import math
from collections.abc import Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from experiments.training.settings import check_micro_batches
from experiments.training.student import Student
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel

LARGEST_SEED: Final = 2**31 - 1  # what jax.random.key takes where 64-bit integers are off
COUNTS: Final = ("steps", "batch", "accumulate", "save_every")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise UserError for numbers, by the names that `train_folder` gives them, of which no training can be made."""
    for name in COUNTS:
        if options[name] < 1:
            raise UserError(f"--{name.replace('_', '-')} is {options[name]}", remedy="give at least 1")
    learning_rate, data_weight, seed = options["learning_rate"], options["data_weight"], options["seed"]
    if not (math.isfinite(learning_rate) and learning_rate > 0):
        raise UserError(f"--learning-rate is {learning_rate}", remedy="give a positive number")
    if options["warm_up"] < 0:
        raise UserError(f"--warm-up is {options['warm_up']}", remedy="give a number of steps, 0 for none")
    if not (math.isfinite(data_weight) and data_weight >= 0):
        raise UserError(f"--data-weight is {data_weight}", remedy="give 0 or a positive number")
    if not 0 <= seed <= LARGEST_SEED:
        raise UserError(f"--seed is {seed}", remedy=f"give a whole number from 0 to {LARGEST_SEED}")


def check_division(batch: int, accumulate: int, mesh: Mesh | None) -> None:
    """Raise UserError where a batch cannot be cut into micro-batches and spread over a mesh."""
    check_micro_batches(batch, accumulate)
    parts = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    if batch // accumulate % parts:
        raise UserError(
            f"a batch of {batch} in {accumulate} parts does not spread over {parts} devices (data x fsdp)",
            remedy=f"choose a batch that {accumulate * parts} divides, or another mesh",
        )


def check_trainable(config: Any, name: str) -> None:
    """Raise UserError for a model, by its parsed configuration, with inputs that training data do not hold."""
    if config.conditions:
        raise UserError(
            f"{name} cannot be trained here: a folder of latents does not hold all of its inputs",
            remedy="quantize it without training, or train a model of another family",
            items=list(config.conditions),
        )


def check_fit(model: VideoModel, student: Student, shapes: Mapping[str, tuple], batch: int) -> None:
    """Trace the rounded model on the data's shapes.

    Args:
        model: Abstract.
        student: What it is trained as.
        shapes: Of one example's `latents` (frames, height, width, channels) and `context` (tokens, dim).
        batch: Examples in a step.

    Raises:
        UserError: What the model or the student says of such inputs.
    """
    latents, context = (jax.ShapeDtypeStruct((batch, *shapes[name]), jnp.float32) for name in ("latents", "context"))
    timestep = jax.ShapeDtypeStruct((batch,), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    jax.eval_shape(
        lambda model, step, *inputs: student.at(student.prepare(model), step)(*inputs),
        model, step, latents, timestep, context,
    )  # fmt: skip
