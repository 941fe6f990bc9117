"""How well a bench model does what its prompts say: sample, and ask the oracle.

python -m experiments.moving_shapes.full_precision [FOLDER] [--clips 320]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

import models
from experiments.moving_shapes.captions import Caption, prompts
from experiments.moving_shapes.oracle import score
from models.pipeline import Pipeline
from qvdjax.diffusion import initial_noise, sample
from qvdjax.errors import UserError

CHECKPOINTS: Final = Path(__file__).parent / "checkpoints"


def sample_videos(
    model: Any, pipeline: Pipeline, sentences: list[str], seeds: list[int], *, batch: int = 32,
    steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None, **how: Any,
) -> np.ndarray:  # fmt: skip
    """One clip a sentence, float32 (clips, frames, height, width, rgb) in [0, 1], from the seed beside it.

    The folder's solver settings hold where none are given; `how` goes to `qvdjax.diffusion.sample`. The last batch is
    filled up to full size.
    """
    videos, batch = [], min(batch, len(sentences))
    for start in range(0, len(sentences), batch):
        rows = [min(row, len(sentences) - 1) for row in range(start, start + batch)]
        context = pipeline.encode([sentences[row] for row in rows])
        own = [seeds[row] for row in rows]
        result = sample(
            model, context, pipeline.encode([pipeline.negative_prompt] * batch),
            noise=initial_noise(own, pipeline.latents_shape), seeds=own,
            solver=pipeline.make_solver(solver), steps=steps or pipeline.steps,
            guidance_scale=pipeline.guidance_scale if guidance_scale is None else guidance_scale, **how,
        )  # fmt: skip
        videos.append(pipeline.decode(jax.device_get(result.latents)))
    return np.concatenate(videos)[: len(sentences)]


def mean_scores(videos: np.ndarray, sentences: list[str]) -> dict[str, float]:
    """Means of the oracle's scores; speed and background over those clips whose caption says them."""
    scores = [score(video, Caption.parse(sentence)) for video, sentence in zip(videos, sentences, strict=True)]
    table = {name: np.array([np.nan if row[name] is None else row[name] for row in scores]) for name in scores[0]}
    return {name: float(np.nanmean(values)) for name, values in table.items() if not np.isnan(values).all()}


def evaluate_full_precision(folder: Path, *, clips: int = 320, seed: int = 0, **sampling: Any) -> dict[str, float]:
    """Sample balanced prompts from a model folder and score them.

    Args:
        folder: A bench model.
        clips: How many; clip i starts from the noise of seed `1000 * seed + i`.
        sampling: `batch`, `steps`, `guidance_scale`, `solver` of `sample_videos`.

    Returns:
        color, shape, direction, speed, background in 0..1, and flicker.
    """
    sentences = prompts(clips, seed)
    seeds = [1000 * seed + number for number in range(clips)]
    model, pipeline = models.load(folder), Pipeline.load(folder)
    return mean_scores(sample_videos(model, pipeline, sentences, seeds, **sampling), sentences)


def main(argv: list[str] | None = None) -> None:
    """Print the scores of a model folder as one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.moving_shapes.full_precision", description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("folder", type=Path, nargs="?", default=CHECKPOINTS / "wan", help="model folder")
    add("--clips", type=int, default=320, help="clips to sample")
    add("--seed", type=int, default=0, help="of prompts and noise")
    add("--batch", type=int, default=32, help="clips sampled together")
    add("--steps", type=int, help="sampling steps instead of the folder's own")
    add("--guidance-scale", type=float, help="instead of the folder's own")
    add("--solver", help="instead of the folder's own")
    options = vars(parser.parse_args(argv))
    print(json.dumps(evaluate_full_precision(options.pop("folder"), **options)))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"full_precision: {error}", file=sys.stderr)
        sys.exit(2)
