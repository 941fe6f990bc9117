"""Run one model through everything, keep the numbers, let the model go."""

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

import models
from experiments.evaluation.measuring import temporal_measures
from experiments.evaluation.options import Options
from experiments.evaluation.runs import FreeRun, Place, predict_along, run_freely
from experiments.evaluation.scoring import oracle_scores
from experiments.evaluation.setup import Setup
from qvdjax.description import describe, weight_bytes
from qvdjax.parallel import make_mesh, shard_batch


@dataclasses.dataclass(frozen=True)
class Observation:
    """What is kept of a model, in host memory.

    Attributes:
        run: Where it went by itself.
        velocity: What it predicted at the reference's latents, float32 (steps, samples, frames, height,
            width, channels).
        video: (samples, frames, height, width, 3) in [0, 1]; None where nothing decodes latents.
        temporal: Flicker and frame difference energy, (samples,) each; None without videos.
        oracle: Colour, shape and direction, (samples,) each, or None.
        layers: Rows of `qvdjax.describe`.
        weight_bytes: Of all parameters, codes at their logical bits.
    """

    run: FreeRun
    velocity: np.ndarray
    video: np.ndarray | None
    temporal: Mapping[str, np.ndarray] | None
    oracle: Mapping[str, np.ndarray] | None
    layers: list[dict]
    weight_bytes: int


def observe(
    folder: Path,
    setup: Setup,
    options: Options,
    *,
    name: str,
    along: np.ndarray | None,
    oracle: bool,
) -> Observation:
    """Load a model, sample with it, and let it predict at given latents.

    Args:
        folder: Model folder.
        name: For progress.
        along: Latents to predict at, as `FreeRun.inputs`; None for the model's own.
        oracle: Whether to ask the oracle.
    """
    mesh = make_mesh(options.mesh) if options.mesh else None
    batch = len(setup.seeds) if options.batch is None else options.batch

    def progress(stage: str):
        def report(done: int) -> None:
            if options.progress is not None:
                options.progress(f"{name}: {stage}", done, len(setup.seeds))

        return report

    # The mesh in scope is what the models' sharding constraints refer to.
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        model = models.load(folder, mesh=mesh, execution=options.execution)
        place: Place = jax.numpy.asarray if mesh is None else lambda rows: shard_batch(rows, mesh)
        run = run_freely(model, setup, batch=batch, place=place, progress=progress("sampling"))
        along = run.inputs if along is None else along
        velocity = predict_along(model, along, setup, batch=batch, place=place, progress=progress("teacher forcing"))
    video = None if setup.pipeline is None else setup.pipeline.decode(run.latents)
    return Observation(
        run=run,
        velocity=velocity,
        video=video,
        temporal=None if video is None else temporal_measures(video),
        oracle=None if video is None or not oracle else oracle_scores(setup, video),
        layers=describe(model),
        weight_bytes=weight_bytes(model),
    )
