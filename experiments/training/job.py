"""From a full-precision model folder and a folder of latents to a quantized folder, trained under its rounding."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

import models
from experiments.bench.ceilings import step_work, training_work
from experiments.bench.shapes import Shape
from experiments.quantizing import check_new, save_quantized, weights_report
from experiments.training.checks import check_division, check_fit, check_numbers, check_trainable
from experiments.training.latents import DataFolder, stream
from experiments.training.log import Log
from experiments.training.loop import Progress, run
from experiments.training.objective import Objective
from experiments.training.plans import averaged, following, group_rates
from experiments.training.settings import Settings
from experiments.training.states import claim, last_state
from experiments.training.student import student_of
from experiments.training.teacher import held_bytes, teacher_recipe
from experiments.training.teaching import teaching_of
from experiments.training.trainer import Trainer
from models.pipeline import FILE, Pipeline
from models.scheduler import sampling_defaults
from qvdjax import recipes
from qvdjax.checkpoint import stored_variables
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, VideoModel, layers_of, refuse_tables
from qvdjax.parallel import check_same, make_mesh, on_first, parse_mesh, process_rows, together
from qvdjax.recipes import Recipe

# Of the options, what need not be the same on all processes: where files are, and who is told.
OWN = ("source", "target", "data", "checkpoints", "log", "tensorboard", "overwrite", "progress", "tell")


def train_folder(
    source: Path,
    target: Path,
    recipe: str,
    data: Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    steps: int = 1000,
    batch: int = 8,
    learning_rate: float = 1e-4,
    warm_up: int = 50,
    data_weight: float = 0.0,
    seed: int = 0,
    mesh: str | Mapping[str, int] | None = None,
    accumulate: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    teacher: str | None = None,
    teacher_cache: Path | None = None,
    remat: bool = False,
    checkpoints: Path | None = None,
    save_every: int = 500,
    resume: bool = False,
    log: Path | None = None,
    tensorboard: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train a model under a recipe's rounding towards itself in full precision; quantize and save the result.

    The student starts from the teacher's weights in float32. Each step rounds its weights and inputs as the
    recipe says, gradients pass straight through, and the loss is the distance of the two predictions, or what the
    recipe puts in its place, at noise levels as a sampler visits them. The averaged weights, or the last ones where
    a module fades in training, are quantized and saved with the source's side files.

    Args:
        source: Full-precision model folder: teacher, and where the student starts.
        target: The new folder; it appears complete or not at all.
        recipe: `<method>-w<bits>a<bits>` that needs no calibration, see `qvdjax.recipes.names`.
        data: Folder of latents and text embeddings, see `experiments.training.latents`.
        overrides: Options of the recipe's method by name.
        steps: Training steps in all, those of an earlier run that is gone on with included.
        batch: Examples in a step.
        learning_rate: Its peak, after `warm_up` steps; a hundredth of it is left at the last step.
        warm_up: Steps of linear warm-up.
        data_weight: Weight of the distance to the data's own velocity, beside 1 for the teacher's.
        seed: Of the order of the data, the noise and the noise levels.
        mesh: Devices to spread weights, optimizer and batch over, such as "fsdp=4,tensor=2"; None for one, or with
            several processes for "fsdp=-1", all devices of all of them.
        accumulate: Micro-batches that a step's batch is cut into, to need less memory.
        dtype: What student and teacher compute in; weights, their optimizer and rounding are float32 always.
        teacher: Recipe by which the teacher is quantized, to need less memory; None leaves it in full precision.
        teacher_cache: Folder of the teacher's predictions: what is missing there is computed before training, which
            then needs no teacher. See `experiments.training.teacher_cache`.
        remat: Recompute each block in the backward pass, to need less memory.
        checkpoints: Folder for training states; the two newest are kept.
        save_every: Steps between two states.
        resume: Go on from the newest state in `checkpoints`, from the start if there is none. The parameters
            are then bit for bit those of a run that was not interrupted. Another mesh may go on, and then they
            agree to rounding.
        log: JSON lines are appended to this file: step, loss, gradient norm, learning rates, seconds a step, steps left
            out; of Phi its rank and its share of small singular values.
        tensorboard: Folder for the same numbers as curves.
        overwrite: Replace a target that is there already.
        progress: Called with (stage, done, total).
        tell: Called with what a user should know before hours pass: what the predictions take on disk.

    Several processes (`qvdjax.parallel.initialize_distributed`) all call this with the same arguments. Each reads the
    model's shards and the batch's rows of its own devices; the first one writes target, log and curves.

    Returns:
        {recipe, steps, first_step, examples, parameters, teacher_bytes, first_loss, last_loss, seconds} and what
        `experiments.quantizing.weights_report` says. Losses are means over the ten or fewer steps of a report, None
        where no step was left to do. `teacher_bytes` is what the teacher held on the devices while the student
        trained.

    Raises:
        UserError: A target that is taken, a recipe that cannot be trained, a quantized, damaged or missing
            model, data that does not fit the model, a number out of range, states or predictions of another run, a
            teacher where the recipe has none, a loss that is not finite, a disk that is full.
        Stopped: With `checkpoints`, SIGTERM: the state is saved, and `resume` goes on from it.
    """
    options = {name: value for name, value in locals().items() if name not in OWN}
    check_same("options", {**options, "checkpoints": checkpoints is not None})
    began = time.perf_counter()
    on_first(check_new, target, overwrite=overwrite)
    check_numbers(options)
    if mesh is None and jax.process_count() > 1:
        mesh = {"fsdp": -1}
    described = None if mesh is None else make_mesh(parse_mesh(mesh) if isinstance(mesh, str) else mesh)
    check_division(batch, accumulate, described)
    if resume and checkpoints is None:
        raise UserError("there is nothing to resume from", remedy="name the folder of checkpoints too")
    chosen, taught_by = recipes.get(recipe, **(overrides or {})), teacher_recipe(teacher)
    abstract = together(models.skeleton, source)
    check_trainable(abstract.config, str(source))
    if any(True for _ in layers_of(abstract, QUANTIZED_LAYERS)):
        raise UserError(f"{source} is quantized already", remedy="train the full-precision model")
    refuse_tables(abstract, str(source), "train the folder it was made from, then tabulate")
    student = student_of(abstract, chosen, steps)
    student.check_storable()
    folder = together(DataFolder, data)
    check_same("data", {"examples": len(folder), **folder.shapes})
    check_fit(abstract, student, folder.shapes, batch)
    settings = Settings(
        seed=seed, batch=batch, learning_rate=learning_rate, final_rate=learning_rate / 100, warm_up=warm_up,
        accumulate=accumulate, dtype=dtype, remat=remat, average=averaged(chosen.training, Settings.average),
        group_rates=group_rates(chosen.training), objective=_objective(source, chosen, data_weight),
    )  # fmt: skip
    rows = None if described is None else process_rows(batch, described)
    batches = stream(data, seed=seed, size=batch, rows=rows)
    examples = {"examples": len(folder), **folder.shapes}
    teaching = teaching_of(source, abstract, taught_by, teacher_cache, settings, examples, batches, steps, tell=tell)
    if checkpoints is not None:
        settled = {
            "model": abstract.config.to_dict(), "recipe": chosen.name, "overrides": dict(overrides or {}),
            **examples, "steps": steps, "batch": batch,
            "learning_rate": learning_rate, "warm_up": warm_up, "data_weight": data_weight, "seed": seed,
            "dtype": dtype, "teacher": teacher,
        }  # fmt: skip
        on_first(claim, checkpoints, settled, resume=resume)
    lines = on_first(Log, log, tensorboard=tensorboard) or Log()
    loaded = together(models.load, source, mesh=described, progress=progress)
    own_types = jax.eval_shape(lambda model: model, loaded)
    frozen, batches = teaching.start(loaded, batches, mesh=described, progress=progress)
    trainer = Trainer(jax.tree.map(_float32, loaded), settings, teacher=frozen, student=student, mesh=described)
    del loaded  # beside the state and the teacher no weights stay
    state = trainer.start(steps)
    trainer.forget_start()
    if resume:
        state = last_state(checkpoints, state) or state
    first_step = int(state["step"])
    state, losses = run(
        trainer, state, batches, lines, checkpoints=checkpoints, save_every=save_every,
        flops=_flops(abstract, folder.shapes, settings, taught=frozen is not None), progress=progress,
    )  # fmt: skip
    quantized = _stored_as(trainer.finished(state), own_types)
    together(save_quantized, quantized, source, target, overwrite=overwrite, progress=progress)
    lines(event="saved", step=steps, folder=str(target))
    return {
        "recipe": chosen.name,
        "steps": steps,
        "first_step": first_step,
        "examples": len(folder),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(trainer.initial)),
        "teacher_bytes": held_bytes(frozen),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "seconds": time.perf_counter() - began,
        **weights_report(quantized),
    }


def _flops(model: VideoModel, shapes: Mapping[str, tuple], settings: Settings, *, taught: bool) -> float:
    """Model FLOPs of one step: counted from the shapes, not asked of the compiler."""
    shape = Shape("", model.config.to_dict(), shapes["latents"], shapes["context"][0])
    return training_work(step_work(shape) * settings.batch, teacher=taught).total


def _objective(source: Path, recipe: Recipe, data_weight: float) -> Objective:
    """Noise levels of the folder's own sampler; captions are dropped where zeros are the empty prompt."""
    pipeline = Pipeline.load(source) if (source / FILE).exists() else None
    own = following(recipe.training, data_weight)
    if pipeline is None:
        return dataclasses.replace(own, solver=sampling_defaults(source).solver, drop_caption=0.0)
    return dataclasses.replace(own, solver=pipeline.make_solver(), drop_caption=0.1)


def _float32(leaf: jax.Array) -> jax.Array:
    # Steps of 1e-4 of a weight are lost in bfloat16.
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _stored_as(model: VideoModel, source: VideoModel) -> VideoModel:
    """The model with what stayed float in the types of the source, from which the types of activations follow."""
    types = {name: one.value.dtype for one in stored_variables(source) for name in one.names}
    graph, _ = nnx.split(model)
    leaves = []
    for one in stored_variables(model):
        dtype = None if one.codes else types.get(one.names[0])
        value = one.value if dtype is None else one.value.astype(dtype)
        leaves.append((one.path, one.variable.replace(value)))
    return nnx.merge(graph, nnx.from_flat_state(leaves))
