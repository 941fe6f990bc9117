"""The training step of a model that is only described: what `qvdjax plan` compiles is what `qvdjax train` runs."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import models
from experiments.training.objective import Objective
from experiments.training.plans import averaged, following, group_rates
from experiments.training.settings import Settings
from experiments.training.student import student_of
from experiments.training.teacher import check_teaches, frozen
from experiments.training.trainer import Trainer
from models.scheduler import PUBLISHED
from qvdjax import parallel
from qvdjax.nn import VideoModel
from qvdjax.recipes import Recipe

STEPS = 2000  # of a whole run, which the phases of a recipe divide


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """A training step on a mesh that need not be there.

    Attributes:
        function: Jitted, never called.
        arguments: Its arguments as ShapeDtypeStructs with shardings.
        weights: The trained parameters among them.
    """

    function: Any
    arguments: tuple
    weights: Any


def published_trainer(
    model: VideoModel, recipe: Recipe | None, batch: int, *, accumulate: int = 1, mesh: Mesh | None = None
) -> Trainer:
    """The trainer of `qvdjax train --dtype bfloat16 --remat`, at the noise schedule its family was published with.

    Args:
        model: In float32; may be abstract.
        recipe: As of `planned_step`.
        batch: Videos in the global batch.
        accumulate: Micro-batches that the batch is cut into.
        mesh: Where everything lies; None for one device.
    """
    plan = None if recipe is None else recipe.training
    solver = PUBLISHED[models.family_of(model.config.to_dict()).name].solver
    objective = Objective() if recipe is None else following(plan)
    settings = Settings(
        batch=batch, accumulate=accumulate, dtype="bfloat16", remat=True,
        average=None if recipe is None else averaged(plan, Settings.average), group_rates=group_rates(plan),
        objective=dataclasses.replace(objective, solver=solver),
    )  # fmt: skip
    return Trainer(model, settings, student=student_of(model, recipe, STEPS), mesh=mesh)


def planned_step(
    config: dict, recipe: Recipe | None, mesh: Mesh, data: dict[str, jax.ShapeDtypeStruct], *, accumulate: int = 1,
    teacher: Recipe | None = None, teacher_cache: bool = False,
) -> PlannedStep:  # fmt: skip
    """The step of `qvdjax train --dtype bfloat16 --remat` on a mesh: float32 master weights, moments and their average.

    Args:
        config: Fields of config.json.
        recipe: Under which the model is trained towards a frozen teacher in bfloat16, as the recipe's plan says; None
            for a float model trained on the data's own target, without a teacher or an average.
        mesh: Where everything lies.
        data: {latents, context} of the global batch, placed on the mesh.
        accumulate: Micro-batches that the batch is cut into.
        teacher: Recipe by which the teacher is quantized; None leaves it in bfloat16.
        teacher_cache: Whether the teacher's predictions come with the batch, and there is no teacher.

    Raises:
        UserError: A recipe that cannot be trained; a choice of teacher where nobody teaches.
    """

    def described(dtype) -> Any:
        return jax.eval_shape(lambda: models.build(config, dtype=dtype))

    trainer = published_trainer(
        described(jnp.float32), recipe, data["latents"].shape[0], accumulate=accumulate, mesh=mesh
    )  # fmt: skip
    taught = recipe is not None and trainer.settings.objective.teacher != 0
    check_teaches(taught, teacher, teacher_cache)
    state = trainer.described(STEPS)
    beside = None
    if teacher_cache:
        latents = data["latents"]
        data = {**data, "teacher": jax.ShapeDtypeStruct(latents.shape, jnp.bfloat16, sharding=latents.sharding)}
    elif taught:
        beside = parallel.abstract(
            jax.eval_shape(lambda: frozen(models.build(config, dtype=jnp.bfloat16), teacher, "bfloat16")), mesh
        )
    arguments = (state, data, parallel.abstract(trainer.rest, mesh), beside)
    return PlannedStep(trainer.run_on, arguments, state["params"])
