"""From two runs to numbers, one a sample: nothing is averaged over samples here."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from experiments.evaluation.runs import FreeRun
from qvdjax.errors import UserError
from qvdjax.metrics import flicker, frame_difference_energy, psnr, random_feature_distance, relative_error, ssim


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """How far a candidate is from its reference. The last axis of all arrays is samples.

    Attributes:
        teacher_forced: ||v_q - v||^2 / ||v||^2 at the reference's latents of each step, (steps, samples).
        trajectory: ||x_q - x||^2 / ||x||^2 of the latents when each model follows its own velocity,
            (steps + 1, samples): entry 0 is the common noise, the last the finished latents.
        psnr: Decibels, (samples,), the mean over frames; None where there is no decoder.
        ssim: (samples,), the mean over frames; None where there is no decoder.
    """

    teacher_forced: np.ndarray
    trajectory: np.ndarray
    psnr: np.ndarray | None
    ssim: np.ndarray | None


def compare_runs(
    reference: FreeRun,
    reference_velocity: np.ndarray,
    candidate: FreeRun,
    candidate_velocity: np.ndarray,
    reference_video: np.ndarray | None,
    candidate_video: np.ndarray | None,
) -> Fidelity:
    """Compare two models that ran on the same samples.

    Args:
        reference, candidate: The free runs.
        reference_velocity, candidate_velocity: Predictions after guidance at `reference.inputs`, float32
            (steps, samples, frames, height, width, channels).
        reference_video, candidate_video: (samples, frames, height, width, 3) in [0, 1], or None.

    Raises:
        UserError: A model produced a value that is not finite; which, and at which step.
    """
    for name, run, velocity in (
        ("reference", reference, reference_velocity),
        ("candidate", candidate, candidate_velocity),
    ):
        _check_finite(name, run, velocity)
    teacher_forced = _error_by_step(candidate_velocity, reference_velocity)
    if not np.isfinite(teacher_forced).all():
        raise UserError("the reference predicts all zeros", remedy="use a trained model as the reference")
    has_video = reference_video is not None and candidate_video is not None
    return Fidelity(
        teacher_forced=teacher_forced,
        trajectory=_error_by_step(candidate.path, reference.path),
        psnr=psnr(candidate_video, reference_video).mean(axis=-1) if has_video else None,
        ssim=ssim(candidate_video, reference_video).mean(axis=-1) if has_video else None,
    )


TEMPORAL_MEASURES = ("flicker", "frame_difference_energy")


def temporal_measures(video: np.ndarray) -> Mapping[str, np.ndarray]:
    """Measures of one model's videos (samples, frames, height, width, 3) alone, each (samples,)."""
    return dict(zip(TEMPORAL_MEASURES, (flicker(video), frame_difference_energy(video)), strict=True))


def video_distance(reference: np.ndarray | None, candidate: np.ndarray | None) -> float | None:
    """Fréchet distance of two sets of videos (samples, frames, height, width, 3) on fixed random features, no FVD; None
    without videos, or with one alone."""
    if reference is None or candidate is None or len(reference) < 2:
        return None
    return random_feature_distance(reference, candidate)


def _error_by_step(estimate: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """(steps, samples, frames, height, width, channels) -> (steps, samples); one step at a time."""
    per_sample = (1, 2, 3, 4)  # frames, height, width, channels
    return np.stack([np.asarray(relative_error(a, b, per_sample)) for a, b in zip(estimate, reference, strict=True)])


def _check_finite(name: str, run: FreeRun, velocity: np.ndarray) -> None:
    for what, array in (("velocity", velocity), ("latents", run.path)):
        steps = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2, 3, 4, 5)))
        if len(steps):
            raise UserError(
                f"the {name}'s {what} is not finite from step {steps[0] + 1} of {len(array)} on",
                remedy="look at its ranges with `qvdjax info`, or evaluate with a wider dtype",
            )
