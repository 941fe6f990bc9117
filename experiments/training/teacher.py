"""The frozen teacher of a training run: the model in full precision, or as integer codes, which take less memory."""

import contextlib
from collections.abc import Callable, Mapping

import einops
import jax
import numpy as np
from jax.sharding import Mesh

from experiments.training.precision import computing_in
from experiments.training.settings import Settings, micro_batches
from qvdjax import recipes
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.parallel import place, shard_batch
from qvdjax.quantization import quantize
from qvdjax.recipes import Recipe

Predict = Callable[[int, Mapping[str, np.ndarray]], jax.Array]
"""predict(step, batch {latents, context}) -> the teacher's prediction (batch, frames, height, width, channels)."""


def teacher_recipe(name: str | None) -> Recipe | None:
    """The recipe that a teacher is quantized by; None stays None, the teacher in full precision.

    Raises:
        UserError: An unknown recipe, or one that needs more than the weights.
    """
    if name is None:
        return None
    recipe = recipes.get(name)
    remedy = "choose one that takes ranges as they come, such as rtn-w8a16 or rtn-w8a8"
    if recipe.training is not None:
        raise UserError(f"the quantizers of {name} are trained, so no teacher is made by it", remedy=remedy)
    if recipe.needs_calibration:
        raise UserError(f"{name} needs calibration, so no teacher is made by it", remedy=remedy)
    return recipe


def check_teaches(taught: bool, recipe: Recipe | None, cached: bool) -> None:
    """Raise UserError where a teacher is described and nobody teaches: a recipe that is trained on the data alone."""
    if not taught and (recipe is not None or cached):
        given = " and ".join(name for name, one in (("--teacher", recipe), ("--teacher-cache", cached)) if one)
        raise UserError("the training follows the data alone and has no teacher", remedy=f"leave out {given}")


def frozen(model: VideoModel, recipe: Recipe | None, dtype: str, mesh: Mesh | None = None) -> VideoModel:
    """The teacher that a float model makes.

    Args:
        model: On its devices; it is left as it is, and what stays float shares its arrays where types agree. May be
            abstract, under `jax.eval_shape`.
        recipe: By which its weights become codes; None leaves them float.
        dtype: What it computes in.
        mesh: Where the codes are spread as the weights were; None for one device.
    """
    if recipe is not None:
        model = quantize(model, recipe)
        # The compiler chose where codes lie.
        model = model if mesh is None else place(model, mesh)
    return computing_in(model, dtype)


def held_bytes(model: VideoModel | None) -> int:
    """Bytes of a model's arrays, each counted once however many devices hold a copy; 0 for None."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def prediction_of(teacher: VideoModel, data: Mapping[str, jax.Array], step: jax.Array, settings: Settings) -> jax.Array:
    """What the teacher predicts from the corrupted batch of a step, micro-batch after micro-batch as in training.

    Args:
        teacher: May be abstract, under `jax.eval_shape`.
        data: {latents (batch, frames, height, width, channels), context (batch, tokens, dim)}, uncorrupted.
        step: int32 ().
        settings: Of the run.

    Returns:
        (batch, frames, height, width, channels) in the type that the teacher computes in.
    """
    corrupted = settings.corrupted(data, step)
    inputs = tuple(corrupted[name] for name in ("latents", "timestep", "context"))
    if settings.accumulate == 1:
        return teacher(*inputs)
    rows = jax.lax.map(lambda part: teacher(*part), micro_batches(inputs, settings.accumulate))
    return einops.rearrange(rows, "micro b ... -> (b micro) ...")  # back to the batch's order


def predictor(teacher: VideoModel, settings: Settings, mesh: Mesh | None = None) -> Predict:
    """`prediction_of` this teacher, compiled; it holds the teacher as long as it lives."""
    compiled = jax.jit(lambda teacher, data, step: prediction_of(teacher, data, step, settings))

    def predict(step: int, batch: Mapping[str, np.ndarray]) -> jax.Array:
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return compiled(teacher, dict(batch) if mesh is None else shard_batch(dict(batch), mesh), np.int32(step))

    return predict
