"""What is sampled: the same prompts, noise and solver for every model that is compared."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.moving_shapes import captions
from models.pipeline import Pipeline
from qvdjax.diffusion import Solver, initial_noise
from qvdjax.errors import UserError

DEFAULT_PROMPTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything that decides a sample, except the model.

    Attributes:
        prompts: Different sentences.
        prompt_of_sample: Which prompt each sample follows.
        seeds: Of each sample's initial noise.
        context, negative_context: float32 (samples, tokens, dim).
        latents_shape: (frames, height, width, channels) of one sample.
        solver, steps, guidance_scale: See `qvdjax.diffusion.sample`.
        solver_fields: The solver's name and options, to be reported.
        fps: Frames a second of the videos in the report.
    """

    prompts: tuple[str, ...]
    prompt_of_sample: tuple[int, ...]
    seeds: tuple[int, ...]
    context: np.ndarray
    negative_context: np.ndarray
    latents_shape: tuple[int, int, int, int]
    solver: Solver
    solver_fields: dict
    steps: int
    guidance_scale: float
    fps: float

    @property
    def unguided(self) -> bool:
        """Whether one pass without the negative context is all there is."""
        return self.guidance_scale == 1

    @property
    def prompt_texts(self) -> list[str]:
        """The prompt of each sample."""
        return [self.prompts[index] for index in self.prompt_of_sample]

    def noise(self, rows: np.ndarray) -> jax.Array:
        """Initial noise of some samples, float32 (len(rows), frames, height, width, channels)."""
        return initial_noise([self.seeds[row] for row in rows], self.latents_shape)


def setup_from_folder(
    folder: Path,
    *,
    prompts: Sequence[str] | None = None,
    count: int | None = None,
    seeds: Sequence[int] | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
) -> tuple[Setup, Pipeline]:
    """Read the sampling defaults of a model folder, and apply what was asked for instead.

    Args:
        folder: A model folder with a `pipeline.json`.
        prompts, count, seeds, steps, guidance_scale: As in `Options`.

    Returns:
        The setup, and the pipeline that decodes its latents.

    Raises:
        UserError: No `pipeline.json`, an unknown word in a prompt, repeated prompts or seeds, or a count
            below one.
    """
    pipeline = Pipeline.load(folder)
    prompts = tuple(prompts) if prompts else _default_prompts(count)
    _refuse_repeats("prompts", prompts)
    if seeds:
        _refuse_repeats("seeds", seeds)
        pairs = [(index, int(seed)) for index in range(len(prompts)) for seed in seeds]
    else:
        pairs = [(index, index) for index in range(len(prompts))]
    prompt_of_sample, sample_seeds = zip(*pairs, strict=True)
    context = pipeline.encode([prompts[index] for index in prompt_of_sample])
    setup = Setup(
        prompts=prompts,
        prompt_of_sample=prompt_of_sample,
        seeds=sample_seeds,
        context=context,
        negative_context=pipeline.encode([pipeline.negative_prompt] * len(pairs)),
        latents_shape=pipeline.latents_shape,
        solver=pipeline.make_solver(),
        solver_fields={"name": pipeline.solver, **dataclasses.asdict(pipeline.make_solver())},
        steps=pipeline.steps if steps is None else steps,
        guidance_scale=float(pipeline.guidance_scale if guidance_scale is None else guidance_scale),
        fps=pipeline.fps,
    )
    setup.solver.schedule(
        setup.steps
    )  # a number of steps one cannot take is refused before models are loaded
    return setup, pipeline


def _default_prompts(count: int | None) -> tuple[str, ...]:
    count = DEFAULT_PROMPTS if count is None else count
    if count < 1:
        raise UserError(f"{count} prompts were asked for", remedy="ask for at least one")
    return tuple(captions.prompts(count))


def _refuse_repeats(what: str, values: Sequence) -> None:
    repeated = sorted({str(value) for value in values if list(values).count(value) > 1})
    if repeated:
        # A repeated prompt would count twice in the bootstrap and make the intervals too narrow.
        raise UserError(f"some {what} are given more than once", remedy="give each once", items=repeated)
