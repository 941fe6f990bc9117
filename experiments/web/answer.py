"""The two videos of a question, and how far the candidate's is from the reference's."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.sampling import sample_folder
from experiments.sampling.output import LATENTS, VIDEO, enlargement
from experiments.web.pair import Pair
from experiments.web.question import Question
from models.pipeline_folder import is_pipeline_folder
from qvdjax.checkpoint import SafetensorsFile
from qvdjax.metrics import psnr, relative_error, ssim
from qvdjax.video import write_mp4

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

SIDES = ("reference", "candidate")


@dataclasses.dataclass(frozen=True)
class Side:
    """What one model did.

    Attributes:
        folder: Its name.
        recipe: How it is quantized; None in full precision.
        video: The mp4 file.
        seconds: Of sampling, compiling left out.
        compile_seconds: Of compiling, next to nothing when the same was asked for before.
        weight_bytes: Of all parameters, codes at their logical bits.
    """

    folder: str
    recipe: str | None
    video: Path
    seconds: float
    compile_seconds: float
    weight_bytes: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """Both videos, and the candidate's distance from the reference's.

    Attributes:
        psnr: Decibels, the mean over frames.
        ssim: The mean over frames, at most 1.
        relative_error: ||y - x||^2 / ||x||^2 of the videos' pixels in [0, 1].
    """

    question: Question
    reference: Side
    candidate: Side
    psnr: float
    ssim: float
    relative_error: float


def answer(
    pair: Pair, question: Question, folder: Path, *, execution: str | None = None, progress: Progress | None = None
) -> Answer:
    """Sample both models from the same noise, write both videos, and measure them before they are compressed.

    One model is held at a time.

    Args:
        pair: The models.
        question: What they are asked for.
        folder: Existing folder for reference.mp4 and candidate.mp4; files of these names are replaced.
        execution: Of quantized layers, see `sample_folder`.
        progress: Called with (stage, done, total), the stage after the name of a side.

    Raises:
        UserError: As `sample_folder`: an unknown word, steps that a model has no tables for, latents that are not
            finite, a folder that cannot be written.
    """
    reports, latents = {}, {}
    for side in SIDES:
        file = folder / f"{side}{LATENTS}"
        reports[side] = sample_folder(
            **_folders(pair, side),
            output=file,
            prompts=[question.prompt],
            seeds=[question.seed],
            steps=question.steps,
            guidance_scale=question.guidance_scale,
            video=pair.video,
            execution=execution,
            progress=_after(side, progress),
        )
        latents[side] = SafetensorsFile(file).read("latents")  # frames height width channels
    decoder = pair.decoder(latents["reference"].shape)
    videos = {side: decoder.decode(latents[side]) for side in SIDES}  # frames height width rgb
    for side, video in videos.items():
        write_mp4(folder / f"{side}{VIDEO}", video, fps=decoder.fps, scale=enlargement(video.shape[1:3]))
    return Answer(question, *(_side(pair, side, reports[side], folder) for side in SIDES), **measures(videos))


def measures(videos: dict[str, np.ndarray]) -> dict[str, float]:
    """psnr, ssim and relative_error of the candidate's video to the reference's.

    Args:
        videos: Of "reference" and "candidate", (frames, height, width, 3) in [0, 1].
    """
    reference, candidate = (videos[side] for side in SIDES)
    return {
        "psnr": float(psnr(candidate, reference).mean()),
        "ssim": float(ssim(candidate, reference).mean()),
        "relative_error": float(relative_error(candidate, reference)),
    }


def _folders(pair: Pair, side: str) -> dict[str, Path]:
    """What is sampled: the candidate of a published pipeline stands in for the pipeline's own model."""
    if side == "reference":
        return {"folder": pair.reference}
    if is_pipeline_folder(pair.reference):
        return {"folder": pair.reference, "denoiser": pair.candidate}
    return {"folder": pair.candidate}


def _side(pair: Pair, side: str, report: dict, folder: Path) -> Side:
    return Side(
        folder=getattr(pair, side).resolve().name,
        recipe=report["quantization"]["recipe"],
        video=folder / f"{side}{VIDEO}",
        seconds=report["sampling_seconds"],
        compile_seconds=report["compile_seconds"],
        weight_bytes=report["memory"]["denoiser"]["weight_bytes"],
    )


def _after(side: str, progress: Progress | None) -> Progress | None:
    """The same progress with the side's name before each stage."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{side}: {stage}", done, total)
