"""Sample a bench model in every way and measure the videos.

    python -m experiments.comparison.sampling.run [--model wan-outlier] [--clips 64] [--rows "W8A8" ...]

One JSON file a row, in docs/results/sampling-<model>; what is there is kept. `experiments.comparison.sampling.page`
makes a table of them. Prompts and noise are the same for all rows, and everything is compared with the videos of the
full-precision model with guidance in all steps.
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

import models
from experiments.comparison.command import run
from experiments.comparison.results import RESULTS, file_of
from experiments.comparison.sampling.rows import REFERENCE, ROWS, SamplingRow
from experiments.moving_shapes.captions import Caption, prompts
from experiments.moving_shapes.full_precision import CHECKPOINTS, sample_videos
from experiments.moving_shapes.oracle import score
from models.pipeline import Pipeline
from qvdjax.diffusion.guidance import guided_steps
from qvdjax.metrics import psnr
from qvdjax.ptq.apply import set_execution

SCORES: Final = ("color", "shape", "direction")
FIRST_SEED: Final = 0


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all rows have in common.

    Attributes:
        clips: Videos, a prompt and a seed each.
        batch: Of them at once.
        execution: Of quantized layers.
    """

    clips: int = 64
    batch: int = 32
    execution: str = "simulate"


def videos(folder: Path, row: SamplingRow, protocol: Protocol) -> np.ndarray:
    """What a row samples, float32 (clips, frames, height, width, rgb) in [0, 1]."""
    pipeline = Pipeline.load(folder)
    model = row.model(models.load(folder), pipeline.make_solver().schedule(pipeline.steps).timesteps)
    model, count = set_execution(model, protocol.execution), protocol.clips
    seeds = [FIRST_SEED + number for number in range(count)]
    return sample_videos(model, pipeline, prompts(count), seeds, batch=protocol.batch, **row.arguments(model))


def passes(folder: Path, row: SamplingRow) -> int:
    """How often a video asks the model; twice in a step that is guided, in one batch too."""
    pipeline = Pipeline.load(folder)
    timesteps = pipeline.make_solver().schedule(pipeline.steps).timesteps
    return pipeline.steps + guided_steps(pipeline.guidance_scale, np.asarray(timesteps), row.guidance_until)


def measured(found: np.ndarray, reference: np.ndarray, sentences: list[str]) -> dict[str, list[float]]:
    """By clip: decibels to the reference's, and the oracle's `SCORES`."""
    scores = [score(video, Caption.parse(sentence)) for video, sentence in zip(found, sentences, strict=True)]
    return {
        "psnr": psnr(found, reference).mean(axis=1).tolist(),  # clips frames -> clips
        **{name: [float(one[name]) for one in scores] for name in SCORES},
    }


def compare(folder: Path, names: list[str], protocol: Protocol, keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Sample rows one after the other; `keep(name, facts)` is called with each one's."""
    reference = videos(folder, ROWS[REFERENCE], protocol)
    for name in names:
        found = reference if name == REFERENCE else videos(folder, ROWS[name], protocol)
        keep(name, {"passes": passes(folder, ROWS[name]), **measured(found, reference, prompts(protocol.clips))})


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comparison.sampling.run", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add, usual = parser.add_argument, Protocol()
    add("--model", default="wan", help="shipped bench model")
    add("--clips", type=int, default=usual.clips, help="videos, a prompt and a seed each")
    add("--batch", type=int, default=usual.batch, help="of them at once")
    add("--execution", choices=["integer", "simulate"], default=usual.execution, help="of quantized layers")
    add("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME", help="rows of the table")
    add("--out", type=Path, help="folder of results (default: docs/results/sampling-MODEL)")
    options = parser.parse_args(argv)
    protocol = Protocol(options.clips, options.batch, options.execution)
    out = options.out or RESULTS / f"sampling-{options.model}"
    out.mkdir(parents=True, exist_ok=True)
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}

    def keep(name: str, facts: dict[str, Any]) -> None:
        whole = {"row": name, "seed": FIRST_SEED, **facts, "protocol": dataclasses.asdict(protocol), **versions}
        file_of(out, name, FIRST_SEED).write_text(json.dumps(whole, indent=1) + "\n")
        print(f"{name}: {facts['passes']} passes, {np.mean(facts['psnr']):.2f} dB", flush=True)

    names = [name for name in options.rows if not file_of(out, name, FIRST_SEED).exists()]
    if names:
        compare(CHECKPOINTS / options.model, names, protocol, keep)


if __name__ == "__main__":
    run(main)
