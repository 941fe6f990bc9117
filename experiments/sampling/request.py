"""What is to be sampled: the folder's defaults, with what was asked for instead."""

import collections
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.sampling.conditions import GUIDANCE, IMAGE, IMAGE_ALONE, check_guidance, read_conditions, read_context
from models import scheduler
from models.image_alone import EncodedImage
from models.pipeline import FILE, Pipeline
from models.prompts import EncodedPrompts
from qvdjax.checkpoint import SafetensorsFile
from qvdjax.diffusion import Solver, related_solver
from qvdjax.diffusion.guidance import NEGATIVE
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Everything that decides the videos, except the model.

    Attributes:
        prompts: Of each video; None where the context came from a file.
        names: Of each video's text, fit for a file name, different for different texts.
        seeds: Of each video's initial noise.
        context, negative_context: float32 (videos, tokens, dim); the latter None without guidance.
        latents_shape: (frames, height, width, channels) of one video.
        negative_prompt: None where the negative context came from a file.
        solver, steps, guidance_scale, dynamic_guidance, guidance_until, first_frame_guidance: See
            `qvdjax.diffusion.sample`. Where the model is given its guidance scale as a condition, it makes one pass.
        pipeline: What decodes the latents; None if nothing does.
        padding: So many first frames of the latents belong to no video, and are left out of what is written.
        conditions: Further inputs of the model by name, float32 (videos, ...); of a guided model of images also what
            stands in for them in the other pass, see `qvdjax.diffusion.guided`.
    """

    prompts: tuple[str | None, ...]
    names: tuple[str, ...]
    seeds: tuple[int, ...]
    context: np.ndarray
    negative_context: np.ndarray | None
    latents_shape: tuple[int, int, int, int]
    negative_prompt: str | None
    solver: Solver
    steps: int
    guidance_scale: float
    pipeline: Pipeline | None
    dynamic_guidance: str | None = None
    guidance_until: float = 0.0
    first_frame_guidance: float | None = None
    padding: int = 0
    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def sampling(self) -> dict:
        """The arguments of `qvdjax.diffusion.sample` that all videos share."""
        names = (
            "solver", "steps", "guidance_scale", "dynamic_guidance", "guidance_until", "first_frame_guidance",
        )  # fmt: skip
        options = {name: getattr(self, name) for name in names}
        return {**options, "guidance_scale": 1.0} if GUIDANCE in self.conditions else options


@dataclasses.dataclass(frozen=True)
class Settings:
    """What may be asked for instead of a folder's defaults; None leaves them."""

    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    solver: str | None = None
    sigma_grid: str | None = None
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    negative_prompt: str | None = None
    dynamic_guidance: str | None = None
    guidance_until: float = 0.0
    first_frame_guidance: float | None = None

    def solver_options(self) -> dict:
        """Fields of the solver, as for `related_solver`."""
        return {"name": self.solver, "shift": self.shift, "sigma_grid": self.sigma_grid}

    def sizes(self, default: tuple[int, int, int] | None) -> tuple[int, int, int]:
        """Frames, height and width of the latents. Raises `UserError` if one is unknown or below 1."""
        names = ("frames", "height", "width")
        default = (None, None, None) if default is None else default
        chosen = [d if getattr(self, n) is None else getattr(self, n) for n, d in zip(names, default, strict=True)]
        missing = [name for name, size in zip(names, chosen, strict=True) if size is None]
        if missing:
            raise UserError(
                "neither the folder nor its family says how large its latents are",
                remedy="give frames, height and width of the latents, not of the video",
                items=missing,
            )
        if min(chosen) < 1:
            raise UserError(f"latents of {' x '.join(map(str, chosen))}", remedy="give sizes of at least 1")
        return tuple(chosen)


def sampler_of(folder: Path, settings: Settings) -> tuple[Solver, int]:
    """The solver and the number of steps that a model folder is sampled with, what was asked for taken instead.

    Raises:
        UserError: A damaged pipeline or scheduler, an unknown solver, settings out of range.
    """
    options = settings.solver_options()
    if (folder / FILE).exists():
        pipeline = Pipeline.load(folder)
        return pipeline.make_solver(**options), _choose(settings.steps, pipeline.steps)
    defaults = scheduler.sampling_defaults(folder, solver_named=settings.solver is not None)
    return related_solver(defaults.solver, **options), _choose(settings.steps, defaults.steps)


def request_from_pipeline(
    folder: Path, prompts: Sequence[str] | None, seeds: Sequence[int], settings: Settings
) -> Request:
    """Every prompt at every seed, encoded and decoded by the folder's own pipeline.

    Without prompts the first shipped caption of the moving shapes is taken.

    Raises:
        UserError: A damaged pipeline, unknown words, an unknown solver, settings out of range.
    """
    pipeline = Pipeline.load(folder)
    if prompts is None:
        from experiments.moving_shapes import captions

        prompts = captions.prompts(1)
    refuse_repeats("prompts", prompts)
    names = _file_names(prompts)
    pairs = [(prompt, int(seed)) for prompt in prompts for seed in seeds]
    negative = pipeline.negative_prompt if settings.negative_prompt is None else settings.negative_prompt
    guidance_scale = _choose(settings.guidance_scale, pipeline.guidance_scale)
    return Request(
        prompts=tuple(prompt for prompt, _ in pairs),
        names=tuple(names[prompt] for prompt, _ in pairs),
        seeds=tuple(seed for _, seed in pairs),
        context=pipeline.encode([prompt for prompt, _ in pairs]),
        negative_context=None if guidance_scale == 1 else pipeline.encode([negative] * len(pairs)),
        latents_shape=(*settings.sizes(pipeline.latents_shape[:3]), pipeline.channels),
        negative_prompt=negative,
        solver=pipeline.make_solver(**settings.solver_options()),
        steps=_choose(settings.steps, pipeline.steps),
        guidance_scale=guidance_scale,
        pipeline=pipeline,
        dynamic_guidance=settings.dynamic_guidance,
        guidance_until=settings.guidance_until,
        first_frame_guidance=settings.first_frame_guidance,
    )


def request_from_context(
    folder: Path, file: Path, config: Any, prompts: Sequence[str] | None, seeds: Sequence[int], settings: Settings,
    padding: int | None = None,
) -> Request:  # fmt: skip
    """As `request_from_embeddings` of a file, to which no prompts can be given.

    Raises:
        UserError: Prompts were given, or the file is missing or damaged; see `request_from_embeddings`.
    """
    if prompts is not None or settings.negative_prompt is not None:
        raise UserError(
            f"prompts were given for a model folder without {FILE}",
            remedy="encode them with the model's own text encoder (qvdjax encode-prompts) and give the file instead",
        )
    return request_from_embeddings(folder, SafetensorsFile(file), config, seeds, settings, padding)


def request_from_embeddings(
    folder: Path, embeddings: SafetensorsFile | EncodedPrompts | EncodedImage, config: Any, seeds: Sequence[int],
    settings: Settings, padding: int | None = None,
) -> Request:  # fmt: skip
    """Every text embedding at every seed, for a model without a `pipeline.json`; the result stays latents.

    Args:
        folder: The model's, whose scheduler or family says how it is sampled, see `models.scheduler`.
        embeddings: Prompts or a picture that were encoded, or a file with `context` (tokens, dim) or (texts, tokens,
            dim), made by the model's own text encoder, and with `negative_context` (tokens, dim) unless guidance is off
            or a condition. Of the model's further conditions it holds those of texts, (...) or (texts, ...), see
            `experiments.sampling.conditions.read_conditions`. A model that follows an image takes latents of its size,
            and zeros are its negative context where there is none. Any floating type.
        config: The model's parsed configuration.
        padding: See `Request`; as the family is published where nothing is asked for.

    Raises:
        UserError: The file lacks a tensor or holds one of another shape; sizes are not given; settings out of range; a
            scheduler that is not here.
    """
    defaults = scheduler.sampling_defaults(folder, solver_named=settings.solver is not None)
    guidance_scale = _choose(settings.guidance_scale, defaults.guidance_scale)
    context = read_context(embeddings, "context")
    conditions = read_conditions(embeddings, config, context.shape[:2])
    embedded, image = GUIDANCE in config.conditions, conditions.get(IMAGE)
    if conditions and image is None and (embedded or guidance_scale != 1):
        check_guidance(settings, embedded=embedded)
    unguided = embedded or guidance_scale == 1
    # Where an image is followed instead of a text, the other pass is given neither it nor its embedding, as in
    # diffusers' pipeline.
    alone = image is not None and IMAGE_ALONE in conditions
    nothing = np.zeros((1, *context.shape[1:]), np.float32) if alone else None
    negative = None if unguided else read_context(embeddings, "negative_context", default=nothing)
    if negative is not None and negative.shape != (1, *context.shape[1:]):
        raise UserError(
            f"{embeddings.path}: negative_context is {negative.shape[1:]} beside a context of {context.shape[1:]}",
            remedy="store one of the context's (tokens, dim)",
        )
    sizes = defaults.latents if image is None else image.shape[1:4]
    if alone:
        sizes = (config.num_frames, *image.shape[2:4])
    if alone and not unguided:
        conditions[NEGATIVE + IMAGE] = np.zeros_like(image)
    first_frame = settings.first_frame_guidance
    if first_frame is None and settings.dynamic_guidance is None and not unguided:
        first_frame = defaults.first_frame_guidance
    texts = len(context)
    rows = np.repeat(np.arange(texts), len(seeds))  # texts -> videos, seeds varying fastest
    conditions = {name: array[rows] for name, array in conditions.items()}
    if embedded:
        conditions[GUIDANCE] = np.full(len(rows), 1000 * guidance_scale, np.float32)  # as diffusers' pipeline has it
    if padding is None:
        padding = defaults.padding if settings.frames is None and sizes == defaults.latents else 0
    prompts, names = (None,) * texts, tuple(f"text{text}" for text in range(texts))
    if isinstance(embeddings, EncodedPrompts):
        prompts, names = embeddings.prompts, tuple(_file_names(embeddings.prompts).values())
    if isinstance(embeddings, EncodedImage):
        names = tuple(_file_names([embeddings.name]).values())
    return Request(
        prompts=tuple(prompts[row] for row in rows),
        names=tuple(names[row] for row in rows),
        seeds=tuple(int(seed) for seed in seeds) * texts,
        context=context[rows],
        negative_context=None if negative is None else np.repeat(negative, len(rows), axis=0),
        latents_shape=(*settings.sizes(sizes), config.latent_channels),
        negative_prompt=embeddings.negative_prompt if isinstance(embeddings, EncodedPrompts) else None,
        solver=related_solver(defaults.solver, **settings.solver_options()),
        steps=_choose(settings.steps, defaults.steps),
        guidance_scale=guidance_scale,
        pipeline=None,
        dynamic_guidance=settings.dynamic_guidance,
        guidance_until=settings.guidance_until,
        first_frame_guidance=first_frame,
        padding=padding,
        conditions=conditions,
    )


def _file_names(prompts: Sequence[str]) -> dict[str, str]:
    """A file name for each prompt: its letters and digits, and a number where two prompts share them."""
    slugs = {prompt: re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "empty" for prompt in prompts}
    alike = collections.defaultdict(list)
    for prompt, slug in slugs.items():
        alike[slug].append(prompt)
    return {
        prompt: slug if len(alike[slug]) == 1 else f"{slug}-{alike[slug].index(prompt) + 1}"
        for prompt, slug in slugs.items()
    }


def refuse_repeats(what: str, values: Sequence) -> None:
    """UserError where a value is given more than once; `what` they are called."""
    repeated = [str(value) for value, count in collections.Counter(values).items() if count > 1]
    if repeated:
        raise UserError(f"some {what} are given more than once", remedy="give each once", items=repeated)


def _choose(asked: float | None, default: float) -> float:
    return default if asked is None else asked
