"""What is sampled: the same prompts, noise and solver for every model that is compared."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

import models
from experiments.evaluation.options import Options
from experiments.moving_shapes import captions
from experiments.sampling.conditions import GUIDANCE
from experiments.sampling.request import request_from_context, sampler_of
from models.pipeline import FILE, Pipeline
from qvdjax.diffusion import Solver, guidance_scales, guided_steps, initial_noise, solver_name
from qvdjax.errors import UserError

DEFAULT_PROMPTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """Everything that decides a sample, except the model.

    Attributes:
        prompts: Different sentences, or names of texts that came as embeddings.
        prompt_of_sample: Which prompt each sample follows.
        seeds: Of each sample's initial noise.
        context: float32 (samples, tokens, dim).
        negative_context: The same; None without guidance.
        latents_shape: (frames, height, width, channels) of one sample.
        solver, steps, guidance_scale, dynamic_guidance, guidance_until, first_frame_guidance: See
            `qvdjax.diffusion.sample`.
        pipeline: What decodes the latents; None where nothing does.
        negative_prompt: None where the negative context came from a file.
        conditions: Further inputs of the model by name, float32 (samples, ...); its guidance may be one of them.
    """

    prompts: tuple[str, ...]
    prompt_of_sample: tuple[int, ...]
    seeds: tuple[int, ...]
    context: np.ndarray
    negative_context: np.ndarray | None
    latents_shape: tuple[int, int, int, int]
    solver: Solver
    steps: int
    guidance_scale: float
    pipeline: Pipeline | None
    dynamic_guidance: str | None = None
    guidance_until: float = 0.0
    first_frame_guidance: float | None = None
    negative_prompt: str | None = None
    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def sampling(self) -> dict:
        """The arguments of `qvdjax.diffusion.sample` that all samples share."""
        names = ("solver", "steps", "dynamic_guidance", "guidance_until", "first_frame_guidance")
        return {**{name: getattr(self, name) for name in names}, "guidance_scale": self.scale_between_passes}

    @property
    def embedded(self) -> bool:
        """Whether the model is given its guidance scale as an input."""
        return GUIDANCE in self.conditions

    @property
    def scale_between_passes(self) -> float:
        """The guidance scale of the sampler, which is 1, one pass, where guidance is an input of the model."""
        return 1.0 if self.embedded else self.guidance_scale

    @property
    def timesteps(self) -> np.ndarray:
        """What the model is told at every step, (steps,)."""
        return self.solver.schedule(self.steps).timesteps

    @property
    def scales(self) -> np.ndarray:
        """The guidance scale of every step, (steps,), or of every step and frame, (steps, frames)."""
        return guidance_scales(
            self.scale_between_passes, self.timesteps, self.dynamic_guidance, first_frame=self.first_frame_guidance,
            frames=self.latents_shape[0],
        )  # fmt: skip

    @property
    def guided_count(self) -> int:
        """How many steps are guided by a second pass, from the first."""
        return guided_steps(self.scale_between_passes, self.timesteps, self.guidance_until)

    @property
    def unguided(self) -> bool:
        """Whether one pass without the negative context is all there is."""
        return self.scale_between_passes == 1

    @property
    def solver_fields(self) -> dict:
        """The solver's name and options, to be reported."""
        return {"name": solver_name(self.solver), **dataclasses.asdict(self.solver)}

    @property
    def prompt_texts(self) -> list[str]:
        """The prompt of each sample."""
        return [self.prompts[index] for index in self.prompt_of_sample]

    def noise(self, rows: np.ndarray) -> jax.Array:
        """Initial noise of some samples, float32 (len(rows), frames, height, width, channels)."""
        return initial_noise([self.seeds[row] for row in rows], self.latents_shape)


def make_setup(folder: Path, options: Options) -> Setup:
    """What to sample: the reference folder's defaults, with what was asked for instead.

    Args:
        folder: The reference's folder.

    Raises:
        UserError: Neither a `pipeline.json` nor a context file, or both; an unknown word in a prompt;
            repeated prompts or seeds; a count or a number of steps below one; an unknown solver, settings out of
            range.
    """
    has_pipeline = (folder / FILE).exists()
    if has_pipeline and options.context_file is not None:
        raise UserError(f"{folder} encodes prompts itself", remedy="give prompts instead of a context file")
    if not has_pipeline and options.context_file is None:
        raise UserError(
            f"{folder} has no {FILE}, so it cannot encode prompts",
            remedy="give a context file: safetensors with `context` and `negative_context`",
        )
    setup = _from_pipeline(folder, options) if has_pipeline else _from_context(folder, options)
    _ = setup.scales, setup.guided_count  # refuses steps and guidance that cannot be, before models are loaded
    return setup


def _from_pipeline(folder: Path, options: Options) -> Setup:
    pipeline = Pipeline.load(folder)
    prompts = tuple(options.prompts) if options.prompts else _default_prompts(options.count)
    _refuse_repeats("prompts", prompts)
    settings = options.settings
    guidance_scale = pipeline.guidance_scale if options.guidance_scale is None else options.guidance_scale
    negative = pipeline.negative_prompt if options.negative_prompt is None else options.negative_prompt
    prompt_of_sample, seeds = _pairs(len(prompts), options.seeds)
    solver, steps = sampler_of(folder, settings)
    return Setup(
        prompts=prompts,
        prompt_of_sample=prompt_of_sample,
        seeds=seeds,
        context=pipeline.encode([prompts[index] for index in prompt_of_sample]),
        negative_context=pipeline.encode([negative] * len(seeds)),
        latents_shape=(*settings.sizes(pipeline.latents_shape[:3]), pipeline.channels),
        solver=solver,
        steps=steps,
        guidance_scale=float(guidance_scale),
        pipeline=pipeline,
        dynamic_guidance=options.dynamic_guidance,
        guidance_until=options.guidance_until,
        first_frame_guidance=options.first_frame_guidance,
        negative_prompt=negative,
    )


def _from_context(folder: Path, options: Options) -> Setup:
    config = models.skeleton(folder).config
    file = Path(options.context_file)
    texts = request_from_context(folder, file, config, options.prompts, [0], options.settings)
    prompt_of_sample, seeds = _pairs(len(texts.context), options.seeds)
    rows = list(prompt_of_sample)
    return Setup(
        prompts=texts.names,
        prompt_of_sample=prompt_of_sample,
        seeds=seeds,
        context=texts.context[rows],
        negative_context=None if texts.negative_context is None else texts.negative_context[rows],
        latents_shape=texts.latents_shape,
        solver=texts.solver,
        steps=texts.steps,
        guidance_scale=float(texts.guidance_scale),
        pipeline=None,
        dynamic_guidance=texts.dynamic_guidance,
        guidance_until=texts.guidance_until,
        first_frame_guidance=texts.first_frame_guidance,
        conditions={name: array[rows] for name, array in texts.conditions.items()},
    )


def _pairs(prompts: int, seeds: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and seed of each sample: every prompt at every seed, or prompt i at seed i."""
    if not seeds:
        return tuple(range(prompts)), tuple(range(prompts))
    _refuse_repeats("seeds", seeds)
    pairs = [(index, int(seed)) for index in range(prompts) for seed in seeds]
    return tuple(index for index, _ in pairs), tuple(seed for _, seed in pairs)


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
