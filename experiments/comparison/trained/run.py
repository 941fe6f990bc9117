"""Train the rows of the comparison and measure what is left of the full-precision model.

    python -m experiments.comparison.trained.run [--bits w4a4] [--seeds 0-2] [--rows QVGen LSQ ...] [--steps 300]

One JSON file a row and seed, in docs/results/qat-<model>-<bits>; what is there is kept, so that an interrupted
comparison goes on. `python -m experiments.comparison.trained.page` makes tables and curves of them.
"""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments.comparison.command import asked, run
from experiments.comparison.row import Row
from experiments.comparison.trained.rows import ROWS
from experiments.moving_shapes.captions import prompts
from experiments.moving_shapes.data import batch
from experiments.moving_shapes.full_precision import CHECKPOINTS, mean_scores, sample_videos
from experiments.training.objective import Objective
from experiments.training.plans import averaged, following, group_rates
from experiments.training.settings import Settings
from experiments.training.student import student_of
from experiments.training.trainer import Trainer
from models.pipeline import Pipeline
from qvdjax.metrics import psnr
from qvdjax.nn import VideoModel

HELD_OUT: Final = 2**20  # seed of validation clips; training seeds are small numbers
CHUNK: Final = 10  # steps between two points of a curve


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all rows have in common.

    Attributes:
        steps, batch, learning_rate, warm_up: Of training; see `Settings`.
        average: Decay a step of averaged weights, where a row may average.
        validation: Held-out clips whose distance to the teacher is measured, at as many noise levels.
        clips: Videos that are sampled and shown to the oracle.
    """

    steps: int = 300
    batch: int = 8
    learning_rate: float = 1e-4
    warm_up: int = 20
    average: float = 0.98
    validation: int = 128
    clips: int = 32


class Reference:
    """The full-precision bench model: the teacher, where every student starts, and what they are measured by.

    Attributes:
        teacher: The model.
        pipeline: Its prompts' encoder, solver and decoder.
        protocol: See `Protocol`.
        sentences: Prompts of the videos.
    """

    def __init__(self, folder: Path, protocol: Protocol):
        self.teacher, self.pipeline, self.protocol = models.load(folder), Pipeline.load(folder), protocol
        self.sentences = prompts(protocol.clips)

    def sample(self, model: VideoModel) -> np.ndarray:
        """Videos of a model from the seeds that all are sampled from, (clips, frames, height, width, rgb) in [0, 1]."""
        return sample_videos(model, self.pipeline, self.sentences, list(range(self.protocol.clips)))

    @functools.cached_property
    def videos(self) -> np.ndarray:
        """The teacher's."""
        return self.sample(self.teacher)

    @functools.cached_property
    def scores(self) -> dict[str, float]:
        """What the oracle says of the teacher's videos."""
        return mean_scores(self.videos, self.sentences)


def compare(reference: Reference, row: Row, bits: str, seed: int) -> dict[str, Any]:
    """Train one row with one seed, and measure it.

    Args:
        reference: See `Reference`.
        row: What is trained.
        bits: Such as "w4a4".
        seed: Of data and noise; measurements are the same for all.

    Returns:
        `recipe`, `curve` (loss, gradient norm and what the student watches, every `CHUNK` steps), `seconds`,
        `measure`'s numbers before training (`start`) and after (`result`), and the oracle's scores of the
        full-precision model (`full_precision`).
    """
    teacher, protocol = reference.teacher, reference.protocol
    recipe, solver = row.recipe(bits), reference.pipeline.make_solver()
    plan = recipe.training
    settings = Settings(
        seed=seed, batch=protocol.batch, learning_rate=protocol.learning_rate, warm_up=protocol.warm_up,
        final_rate=protocol.learning_rate / 100, average=averaged(plan, protocol.average),
        group_rates=group_rates(plan), objective=dataclasses.replace(following(plan), solver=solver),
    )  # fmt: skip
    student = student_of(teacher, recipe, protocol.steps)
    trainer = Trainer(teacher, settings, teacher=teacher, student=student, draw=batch)
    state, curve, began = trainer.start(protocol.steps), [], time.perf_counter()
    start = measure(student.at(trainer.model(state), jnp.int32(0)), reference, videos=False)
    while (step := int(state["step"])) < protocol.steps:
        state, metrics = trainer.advance(state, min(CHUNK, protocol.steps - step))
        trainer.check(state)
        point = {name: float(metrics[name]) for name in ("loss", "gradient_norm")}
        curve.append({"step": int(state["step"]), **point, **trainer.watched(state)})
    seconds = time.perf_counter() - began
    # As it is trained, not as it is stored: the two agree (tests), and a Phi that is kept cannot be stored.
    trained = student.at(trainer.model(state), jnp.int32(protocol.steps))
    result = measure(trained, reference)
    return {
        "recipe": recipe.name, "curve": curve, "seconds": seconds, "start": start, "result": result,
        "full_precision": reference.scores,
    }  # fmt: skip


def measure(model: VideoModel, reference: Reference, *, videos: bool = True) -> dict[str, float]:
    """Distances of a model from its teacher, and what its videos show.

    Returns:
        `validation`: squared distance of the predictions relative to the teacher's, over held-out clips at noise
        levels as a sampler visits them; with `videos` also `psnr` of the same seeds' videos against the teacher's, dB,
        and the oracle's scores.
    """
    found = {"validation": float(_validation(model, reference))}
    if not videos:
        return found
    ours = reference.sample(model)
    scores = mean_scores(ours, reference.sentences)
    return {**found, "psnr": float(psnr(ours, reference.videos).mean()), **scores}


def _validation(model: VideoModel, reference: Reference) -> jax.Array:
    data = _draw(HELD_OUT, 0, reference.protocol.validation)
    objective = Objective(solver=reference.pipeline.make_solver(), drop_caption=0.1)
    corrupted = objective.corrupt(data, jax.random.key(HELD_OUT))
    inputs = (corrupted["latents"], corrupted["timestep"], corrupted["context"])
    wanted = _call(reference.teacher, *inputs)
    return jnp.square(_call(model, *inputs) - wanted).sum() / jnp.square(wanted).sum()


# Compiled once for all rows of one structure, the teacher's among them.
_draw = jax.jit(batch, static_argnums=2)
_call = jax.jit(lambda model, *inputs: model(*inputs))


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, all rows of a seed before the next seed."""
    wanted = asked(
        argv, program="experiments.comparison.trained.run", purpose=__doc__.split("\n\n")[0],
        rows=lambda _: ROWS, protocol=Protocol, kind="qat",
    )  # fmt: skip
    reference = Reference(CHECKPOINTS / wanted.model, wanted.protocol)
    for seed in wanted.seeds:
        for name in wanted.missing(seed):
            found = compare(reference, ROWS[name], wanted.bits, seed)
            wanted.keep(name, seed, found)
            print(f"{name}, seed {seed}: {found['result']} in {found['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    run(main)
