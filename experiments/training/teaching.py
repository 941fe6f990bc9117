"""How a run is taught: by a model beside the student, or by predictions that were made before."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from experiments.cli.outcome import size
from experiments.training.settings import Settings
from experiments.training.teacher import check_teaches, frozen, prediction_of, predictor
from experiments.training.teacher_cache import Taught, TeacherCache
from qvdjax.checkpoint import CheckpointFolder, fingerprint
from qvdjax.diffusion import solver_name
from qvdjax.nn import VideoModel
from qvdjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Teaching:
    """What teaches a run.

    Attributes:
        recipe: By which the teacher is quantized; None for full precision.
        cache: Of its predictions, or None.
        settings, steps: Of the run.
    """

    recipe: Recipe | None
    cache: TeacherCache | None
    settings: Settings
    steps: int

    def start(
        self, model: VideoModel, batches: Any, *, mesh: Mesh | None = None, progress: Any = None
    ) -> tuple[VideoModel | None, Any]:
        """What stays while the student trains: the teacher or None, and the batches.

        With a cache what is missing there is computed first, by a teacher that goes again.

        Args:
            model: In full precision, on its devices.
            batches: batches[k] is the batch of step k, {latents, context}.
            mesh: Where everything lies, or None for one device.
            progress: Called with (stage, done, total).

        Raises:
            UserError, Stopped: See `TeacherCache.fill`.
        """
        if self.settings.objective.teacher == 0:
            return None, batches
        if self.cache is None:
            return frozen(model, self.recipe, self.settings.dtype, mesh), batches
        if self.cache.missing(self.steps):
            predict = predictor(frozen(model, self.recipe, self.settings.dtype, mesh), self.settings, mesh)
            self.cache.fill(self.steps, batches, predict, progress=progress)
        return None, Taught(batches, self.cache)


def teaching_of(
    source: Path, model: VideoModel, recipe: Recipe | None, folder: Path | None, settings: Settings,
    data: Mapping[str, Any], batches: Any, steps: int, *, tell: Callable[[str], None] | None = None,
) -> Teaching:  # fmt: skip
    """What teaches a run, checked before a weight is read.

    Args:
        source: Folder of the full-precision model.
        model: The same; may be abstract.
        recipe: By which the teacher is quantized, or None.
        folder: Of its predictions, or None.
        settings: Of the run.
        data: `examples`, their number, and the shapes of `latents` and `context`.
        batches: batches[k] is the batch of step k.
        steps: Of the run.
        tell: Called with what the predictions will take on disk.

    Raises:
        UserError: The run follows the data alone; a folder of predictions that belongs to another run, is damaged or
            has no place on its disk.
    """
    check_teaches(settings.objective.teacher != 0, recipe, folder is not None)
    if folder is None:
        return Teaching(recipe, None, settings, steps)
    described = {
        name: jax.ShapeDtypeStruct((settings.batch, *data[name]), jnp.float32) for name in ("latents", "context")
    }
    prediction = jax.eval_shape(
        lambda model, *given: prediction_of(frozen(model, recipe, settings.dtype), *given, settings),
        model, described, jax.ShapeDtypeStruct((), jnp.int32),
    )  # fmt: skip
    cache = TeacherCache(folder, what_predictions_depend_on(source, model, recipe, settings, data), prediction)
    cache.check_data(batches)
    needed = cache.check_space(steps)
    if tell and needed:
        tell(f"{size(needed)} of the teacher's predictions will be written to {folder}")
    return Teaching(recipe, cache, settings, steps)


def what_predictions_depend_on(
    source: Path, model: VideoModel, recipe: Recipe | None, settings: Settings, data: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that decides what a teacher predicts at a step, JSON types; nothing about the student.

    Args:
        source: Folder of the full-precision model.
        model: The same; may be abstract.
        recipe: The teacher's.
        settings: Of the run.
        data: Number and shapes of the examples.
    """
    folder, solver = CheckpointFolder.open(source), settings.objective.solver
    return {
        "model": model.config.to_dict(),
        "weights": fingerprint(folder),
        "teacher": None if recipe is None else recipe.name,
        "dtype": settings.dtype,
        "data": dict(data),
        "seed": settings.seed,
        "batch": settings.batch,
        "solver": {"name": solver_name(solver), **dataclasses.asdict(solver)},
        "drop_caption": settings.objective.drop_caption,
        # Tells generators of random numbers apart: some differ by device, and a setting of jax chooses.
        "noise": np.asarray(jax.random.bits(settings.noise_key(0), (2,))).tolist(),
    }  # fmt: skip
