"""The two models of a page: whether they can be compared, and what the page begins with."""

import dataclasses
from pathlib import Path

import models
from experiments.cli.values import prompts
from experiments.evaluation.same_model import check_same_model
from experiments.moving_shapes import captions
from experiments.sampling.decoding import Decoder, check_vae, of_pipeline, of_vae
from experiments.sampling.request import Settings, sampler_of
from experiments.sampling.video_size import padded_latents_of
from models.pipeline import FILE, Pipeline
from models.pipeline_folder import PipelineFolder, is_pipeline_folder
from models.scheduler import sampling_defaults
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError

PRESETS = 12
PUBLISHED_PRESETS = Path(__file__).parents[1] / "prompts" / "motion-rich.txt"


@dataclasses.dataclass(frozen=True)
class Pair:
    """A reference and a candidate that take the same inputs.

    Attributes:
        reference: Model folder with a `pipeline.json`, or folder of a published pipeline.
        candidate: Model folder of the same architecture and size.
        steps, guidance_scale: What the reference is sampled with by default.
        presets: Prompts to choose from.
        video: (frames, height, width) in pixels, of a published pipeline; None leaves its family's.
    """

    reference: Path
    candidate: Path
    steps: int
    guidance_scale: float
    presets: tuple[str, ...]
    video: tuple[int, int, int] | None = None

    def decoder(self, latents: tuple[int, ...]) -> Decoder:
        """What makes videos of both models' latents: the reference's. A VAE is read now.

        Args:
            latents: (frames, height, width, channels) of one video's.
        """
        if not is_pipeline_folder(self.reference):
            return of_pipeline(Pipeline.load(self.reference))
        whole = PipelineFolder.open(self.reference)
        folder = check_vae(whole, models.parse_config(CheckpointFolder.open(whole.denoiser).config))
        return of_vae(
            models.load_vae(folder), folder, latents, sampling_defaults(whole.denoiser, solver_named=True).fps
        )


def open_pair(reference: Path, candidate: Path, *, video: tuple[int, int, int] | None = None) -> Pair:
    """Look at two folders; no weight is read.

    Args:
        reference: Model folder with a `pipeline.json`, or folder of a published pipeline.
        candidate: Model folder; beside a published pipeline it stands in for the pipeline's own model.
        video: (frames, height, width) in pixels, of a published pipeline.

    Raises:
        UserError: A missing or corrupt folder; different architectures, sizes, samplers or latents; a folder that
            encodes no prompts; a video's size for a model folder, or one that the pipeline cannot make.
    """
    reference, candidate = Path(reference), Path(candidate)
    if is_pipeline_folder(reference):
        return _published(reference, candidate, video)
    if video is not None:
        raise UserError(f"{reference} says itself how large its videos are", remedy="leave out --video")
    check_same_model(reference, candidate)
    for folder in (reference, candidate):
        if not (folder / FILE).exists():
            raise UserError(
                f"{folder} has no {FILE}, so it cannot encode prompts",
                remedy="name the folder of the reference's whole pipeline first, then the candidate",
            )
    first, second = Pipeline.load(reference), Pipeline.load(candidate)
    solvers = [sampler_of(folder, Settings())[0] for folder in (reference, candidate)]
    # Otherwise the page would show a difference that is none of the models'.
    if solvers[0] != solvers[1] or first.latents_shape != second.latents_shape or first.words != second.words:
        raise UserError(
            f"{reference} and {candidate} are sampled differently: their {FILE} name other samplers, latents or words",
            remedy=f"copy the reference's {FILE} and word table to the candidate",
        )
    known = set(captions.WORDS) <= set(first.words)
    return Pair(
        reference=reference,
        candidate=candidate,
        steps=first.steps,
        guidance_scale=first.guidance_scale,
        presets=tuple(captions.prompts(PRESETS)) if known else (),
    )


def _published(reference: Path, candidate: Path, video: tuple[int, int, int] | None) -> Pair:
    whole = PipelineFolder.open(reference)
    check_same_model(whole.denoiser, candidate)
    config = models.parse_config(CheckpointFolder.open(whole.denoiser).config)
    vae = check_vae(whole, config)
    if video is not None:
        padded_latents_of(vae, video, config)
    defaults = sampling_defaults(whole.denoiser)
    # A converted candidate carries a scheduler of its own, with which it would be sampled.
    if sampling_defaults(candidate) != defaults:
        raise UserError(
            f"{whole.denoiser} and {candidate} are sampled differently: their schedulers differ",
            remedy="copy the reference's scheduler to the candidate",
        )
    return Pair(
        reference=reference,
        candidate=candidate,
        steps=defaults.steps,
        guidance_scale=defaults.guidance_scale,
        presets=tuple(prompts((), PUBLISHED_PRESETS)[:PRESETS]),
        video=video,
    )
