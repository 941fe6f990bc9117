"""From a model folder to a calibration set: sample prompts and keep what the model was given."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from experiments.sampling.record import settings_record
from experiments.sampling.request import Request, Settings, request_from_context, request_from_pipeline
from models.pipeline import FILE, Pipeline
from models.scheduler import own_solver
from qvdjax.calibration import CalibrationSet, Trajectory, collect
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.diffusion import compile_sampler, initial_noise, sample, solver_name
from qvdjax.errors import UserError
from qvdjax.nn import refuse_tables
from qvdjax.parallel import make_mesh, to_host, together

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

PROMPTS = 8
# Not what `evaluate` uses by default (captions in the order of seed 0, noise of seeds 0, 1, ...): a model
# should not be judged on what its ranges were fitted to.
CAPTION_ORDER, FIRST_SEED = 1, 1000


def calibrate_folder(
    source: Path,
    target: Path,
    *,
    prompts: Sequence[str] | None = None,
    count: int = PROMPTS,
    seeds: Sequence[int] | None = None,
    first_seed: int = FIRST_SEED,
    context_file: Path | None = None,
    settings: Settings | None = None,
    mesh: Mapping[str, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Sample prompts one by one with the model of a folder; an interrupted run goes on where it stopped.

    Args:
        source: Model folder, full precision as a rule.
        target: Calibration folder, see `qvdjax.calibration.CalibrationSet`.
        prompts: Sentences; by default `count` captions of the moving shapes.
        count: Number of captions where no prompts are given.
        seeds: Every prompt is sampled at each. By default prompt i is sampled once, at seed `first_seed` + i.
        first_seed: See `seeds`.
        context_file: Text embeddings for a folder without a `pipeline.json`, see
            `experiments.sampling.request.request_from_context`.
        settings: Steps, guidance and so on instead of the folder's.
        mesh: Devices to spread the model over, axis name to size; by default the first device.
        progress: Called with (stage, done, total).

    Returns:
        {folder, samples, steps, guidance_scale, model_inputs}; the last counts the calls that were recorded.

    Raises:
        UserError: A missing or corrupt model folder or one with tables, unknown words, a target that holds another
            set or cannot be written, latents that are not finite.
    """
    opened = CheckpointFolder.open(source)
    refuse_tables(models.skeleton(opened), str(source), "calibrate the full-precision folder it was made from")
    config = opened.config
    request = _request(source, config, prompts, count, seeds, first_seed, context_file, settings or Settings())
    made_by = {"config": _architecture(config), **settings_record(request)}
    entries = [{"prompt": prompt, "seed": seed} for prompt, seed in zip(request.prompts, request.seeds, strict=True)]
    device_mesh = None if mesh is None else make_mesh(mesh)
    model = together(models.load, source, mesh=device_mesh, progress=progress)
    with contextlib.nullcontext() if device_mesh is None else jax.set_mesh(device_mesh):
        made = collect(target, made_by, entries, _recorder(model, request), progress=progress)
    branches = 1 if request.negative_context is None else 2
    return {
        "folder": str(target),
        "samples": len(made),
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "model_inputs": len(made) * request.steps * branches,
    }


def open_calibration(folder: Path, source: Path) -> CalibrationSet:
    """A calibration folder for the model of `source`; UserError if it was made with another architecture."""
    calibration = CalibrationSet.open(folder)
    if calibration.manifest.get("config") != _architecture(CheckpointFolder.open(source).config):
        raise UserError(
            f"{folder} was made with a model of another architecture than {source}",
            remedy="calibrate with this model",
        )
    return calibration


def check_sampled_alike(calibration: CalibrationSet, source: Path) -> None:
    """UserError for a calibration set of another solver, schedule or number of frames than a model folder asks for.

    Ranges are those of the noise levels that were met, and ranges of frames and timesteps belong to theirs. What the
    folder says nothing about may be anything: steps and guidance always, all where it has neither a pipeline nor a
    scheduler.
    """
    pipeline = Pipeline.load(source) if (source / FILE).exists() else None
    solver = own_solver(source) if pipeline is None else pipeline.make_solver()
    wanted = {} if solver is None else {"solver": solver_name(solver), **dataclasses.asdict(solver)}
    made = {name: calibration.manifest[name] for name in wanted if name in calibration.manifest}
    if pipeline is not None and "latents" in calibration.manifest:
        wanted["frames"], made["frames"] = pipeline.frames, calibration.manifest["latents"][0]
    wanted = json.loads(json.dumps(wanted))
    others = [f"{name} {made[name]} for {wanted[name]}" for name in made if made[name] != wanted[name]]
    if others:
        raise UserError(
            f"{calibration.path} was sampled otherwise than {source} is",
            remedy="calibrate again without these options, or quantize with --other-sampler to take it as it is",
            items=others,
        )  # fmt: skip


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json that decide shapes; not its quantization, nor who wrote it."""
    kept = {key: value for key, value in config.items() if key != "quantization_config" and key[0] != "_"}
    return {"_class_name": config.get("_class_name"), **kept}


def _request(source, config, prompts, count, seeds, first_seed, context_file, settings: Settings) -> Request:
    if not (source / FILE).exists():
        if context_file is None:
            raise UserError(
                f"{source} has no {FILE}, so it cannot encode prompts",
                remedy="give a file of text embeddings with --context",
            )
        parsed = models.parse_config(config)
        return request_from_context(source, context_file, parsed, prompts, seeds or (first_seed,), settings)
    if context_file is not None:
        raise UserError(f"{source} encodes prompts itself", remedy="give prompts instead of --context")
    if prompts is None:
        if count < 1:
            raise UserError(f"{count} prompts", remedy="ask for at least one")
        from experiments.moving_shapes import captions

        prompts = captions.prompts(count, CAPTION_ORDER)
    request = request_from_pipeline(source, prompts, seeds or (first_seed,), settings)
    if seeds is None:
        own = tuple(range(first_seed, first_seed + len(prompts)))
        request = dataclasses.replace(request, seeds=own)
    return request


def _recorder(model, request: Request) -> Callable[[int], Trajectory]:
    """A function from the number of a sample to the model's inputs while it is sampled.

    Compiles now, so that settings that the model cannot take are refused before anything is written.
    """

    def conditions(number: int) -> dict[str, np.ndarray]:
        return {name: array[number, None] for name, array in request.conditions.items()}  # ... -> 1 ...

    def inputs(number: int) -> dict[str, Any]:
        negative = request.negative_context
        return {
            "context": request.context[number, None],  # tokens dim -> 1 tokens dim
            "negative_context": None if negative is None else negative[number, None],
            "noise": initial_noise([request.seeds[number]], request.latents_shape),
            "seeds": [request.seeds[number]],
            **conditions(number),
            "trajectory": True,
            **request.sampling,
        }

    compile_sampler(model, **inputs(0))
    timestep = np.asarray(request.solver.schedule(request.steps).timesteps, np.float32)

    def record(number: int) -> Trajectory:
        given = inputs(number)
        trajectory = sample(model, **given).trajectory
        latents = to_host(trajectory).astype(np.float32)[:, 0]  # steps 1 f h w c -> steps f h w c
        if not np.isfinite(latents).all():
            raise UserError("the model sampled latents that are not finite", remedy="try a lower guidance scale")
        context, negative = given["context"][0], given["negative_context"]
        # Without guidance the model never meets the negative prompt: its own context stands in.
        own = {name: array[0] for name, array in conditions(number).items()}
        return Trajectory(latents, timestep, context, context if negative is None else negative[0], own)

    return record
