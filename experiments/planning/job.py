"""`qvdjax plan`: compile one step of a named model for a TPU slice that is not here."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

import models
from experiments.bench.ceilings import step_work
from experiments.bench.shapes import CONFIGS, LATENT_SIZES, Shape
from experiments.planning.bounds import bound
from experiments.planning.reconstruction import planned_reconstruction
from experiments.sampling.conditions import IMAGE
from experiments.training.checks import check_trainable
from experiments.training.planned import planned_step
from experiments.training.settings import check_micro_batches
from experiments.training.teacher import teacher_recipe
from models.unet_config import UNetConfig
from qvdjax import parallel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.ptq import apply_schemes
from qvdjax.recipes import Recipe, decide, get

FLOAT_RECIPES = ("none", "bf16")
STEPS = ("sample", "train", "reconstruct")


def plan(
    model: str,
    recipe: str,
    topology: str,
    *,
    batch: int = 1,
    mesh: Mapping[str, int] | str | None = None,
    step: Literal["sample", "train", "reconstruct"] = "sample",
    size: str | None = None,
    accumulate: int = 1,
    overrides: Mapping[str, Any] | None = None,
    layers: int | None = None,
    teacher: str | None = None,
    teacher_cache: bool = False,
    effort: float | None = None,
) -> dict:
    """Does one step fit a slice, and what do its chips exchange? Only compiles.

    Args:
        model: A named configuration ("wan2.1-t2v-14b", or "wan2.1-14b" for short), or a folder with a
            config.json.
        recipe: Quantization by name; "none" for bfloat16.
        topology: The slice, such as "v5e:2x4".
        batch: Videos in the global batch.
        mesh: Axis sizes, as a mapping or as "fsdp=2,context=4"; by default as many devices as divide the number of
            heads split the tokens (`context`; not of a UNet), and the rest spreads weights and batch (`fsdp`).
        step: "sample", one forward pass of the model (guidance takes two); or "train", one step of `qvdjax train`
            in bfloat16 with blocks recomputed, teacher included (see `experiments.training.planned`); or "reconstruct",
            one of `qvdjax quantize` with a recipe that reconstructs blocks, on `batch` model inputs, the float model
            beside it (see `experiments.planning.reconstruction`).
        size: Video size, see `experiments.bench.shapes.LATENT_SIZES`; None for the family's usual one.
        accumulate: Micro-batches that a training step's batch is cut into.
        overrides: Options of the recipe's method by name.
        layers: Compile a model of so many blocks (HunyuanVideo: of each kind) in the place of all.
        teacher: Recipe by which a training step's teacher is quantized; None leaves it in bfloat16.
        teacher_cache: Whether the teacher's predictions come with the batch, as from `qvdjax train --teacher-cache`.
        effort: The compiler's, see `qvdjax.parallel.plan`.

    Returns:
        What `qvdjax.parallel.plan` reports, and `model`, `recipe`, `overrides`, `topology`, `mesh`, `batch`, `step`,
        `size`, `accumulate`, `layers`, `teacher`, `teacher_cache`, `effort`, `left_whole` (weights that this mesh
        cannot split as the rules ask); `model_flops`, `bound_seconds` and `bound_by`, which are arithmetic (see
        `experiments.planning.bounds`).

    Raises:
        UserError: Unknown names, a mesh or micro-batches that do not fit, a recipe that cannot be trained, or a
            teacher where there is none.
    """
    config = _config(model)
    if layers is not None:
        if layers < 1:
            raise UserError(f"a model of {layers} layers", remedy="give at least 1")
        kinds = [name for name in ("num_layers", "num_single_layers") if hasattr(models.parse_config(config), name)]
        config = {**config, **dict.fromkeys(kinds, layers)}
    family = models.family_of(config).name
    if family not in LATENT_SIZES:
        raise UserError(f"no plans are made for {family} models yet", remedy=f"known: {', '.join(LATENT_SIZES)}")
    sizes = LATENT_SIZES[family]
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise UserError(f"unknown size {size!r}", remedy=f"choose from {', '.join(sizes)}")
    if step not in STEPS:
        raise UserError(f"unknown step {step!r}", remedy=f"choose from {', '.join(STEPS)}")
    if step == "train":
        check_trainable(models.parse_config(config), model)
    if batch < 1:
        raise UserError(f"a batch of {batch}", remedy="give at least 1")
    check_micro_batches(batch, accumulate)
    if recipe in FLOAT_RECIPES and overrides:
        raise UserError(f"{recipe} has no options", remedy="leave --set out, or name a recipe")
    chosen, taught_by = None if recipe in FLOAT_RECIPES else get(recipe, **(overrides or {})), teacher_recipe(teacher)
    if step != "train" and (taught_by is not None or teacher_cache):
        raise UserError(f"a {step} step has no teacher", remedy="plan --step train, or leave the teacher out")
    described = _mesh(topology, parallel.parse_mesh(mesh) if isinstance(mesh, str) else mesh, config)
    latents, timestep, context, conditions = _inputs(config, sizes[size], batch, described)
    if step == "sample":
        weights = jax.eval_shape(lambda: _build(config, chosen))
        arguments = parallel.abstract(weights, described)
        inputs = (latents, timestep, context, conditions)
        report = parallel.plan(_sample_step, arguments, *inputs, mesh=described, effort=effort)
    elif step == "reconstruct":
        if chosen is None:
            raise UserError(f"{recipe} reconstructs no blocks", remedy="choose one that does, such as flatquant")
        given = {"latents": latents, "timestep": timestep, "context": context, **conditions}
        function, arguments, weights, waiting = planned_reconstruction(config, chosen, described, given)
        report = parallel.plan(function, *arguments, mesh=described, resident=waiting, effort=effort)
    else:
        data = {"latents": latents, "context": context}
        training = planned_step(
            config, chosen, described, data, accumulate=accumulate, teacher=taught_by, teacher_cache=teacher_cache
        )
        weights = training.weights
        report = parallel.plan(training.function, *training.arguments, mesh=described, effort=effort)
    shape = Shape(model, config, (*latents.shape[1:],), context.shape[1])
    kind = described.devices.flat[0].device_kind
    blocks = sum(map(len, jax.eval_shape(lambda: _build(config, None)).stacks))
    least = bound(
        # A step of reconstruction is of one block.
        step_work(shape) * (batch / blocks if step == "reconstruct" else batch), kind, described.devices.size,
        report["argument_bytes"], step=step,
        recipe=chosen, teacher=taught_by, teacher_cache=teacher_cache,
    )  # fmt: skip
    return {
        **report, **least, "model": model, "recipe": recipe, "overrides": dict(overrides or {}), "topology": topology,
        "mesh": dict(described.shape), "batch": batch, "step": step, "size": size, "accumulate": accumulate,
        "layers": blocks, "teacher": teacher, "teacher_cache": teacher_cache, "effort": effort,
        "left_whole": parallel.left_whole(weights, described),
    }  # fmt: skip


def _config(model: str) -> dict:
    names = {**{name.replace("-t2v", ""): name for name in CONFIGS}, **{name: name for name in CONFIGS}}
    if model in names:
        return CONFIGS[names[model]]
    file = Path(model) / "config.json"
    try:
        return json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"no model is called {model!r}, and there is no readable {file}",
            remedy=f"choose from {', '.join(CONFIGS)}, or give a model folder",
        ) from error


def _mesh(topology: str, sizes: Mapping[str, int] | None, config: dict) -> Mesh:
    if sizes is None:
        devices = parallel.topology_mesh(topology).devices.size
        parsed = models.parse_config(config)
        # A UNet's video stays whole on a chip: its convolutions need neighbours, its motion modules all frames.
        context = 1 if isinstance(parsed, UNetConfig) else math.gcd(devices, parsed.num_attention_heads)
        sizes = {"context": context, "fsdp": -1}
    return parallel.topology_mesh(topology, sizes)


def _build(config: dict, recipe: Recipe | None) -> VideoModel:
    model = models.build(config, dtype=jnp.bfloat16)
    if recipe is None:
        return model
    # Shapes alone: what calibration would put into ranges and transforms is not looked at.
    return apply_schemes(model, decide(model, recipe).schemes, execution="integer")


def _inputs(config: dict, size: tuple[int, ...], batch: int, mesh: Mesh) -> tuple:
    """Latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim), and further
    inputs (batch, ...) by name."""

    def rows(shape, dtype):
        spec, _ = parallel.partition_spec(shape[:1], ("batch",), mesh)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    parsed = models.parse_config(config)
    shapes, channels = dict(parsed.conditions), parsed.in_channels
    if IMAGE in shapes:  # an image's latents come beside those that are sampled
        shapes[IMAGE], channels = (*size, shapes[IMAGE][-1]), parsed.latent_channels
    latents = rows((batch, *size, channels), jnp.float32)
    context = rows((batch, parsed.text_tokens, parsed.text_dim), jnp.float32)
    conditions = {name: rows((batch, *shape), jnp.float32) for name, shape in shapes.items()}
    return latents, rows((batch,), jnp.float32), context, conditions


def _sample_step(model, latents, timestep, context, conditions):
    return model(latents, timestep, context, **conditions)
