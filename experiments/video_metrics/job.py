"""Scoring a folder of videos, alone or against another one with the same names."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.video_metrics.fvd import load_i3d
from experiments.video_metrics.lpips import load_lpips
from models.clip_pair import ClipPair
from qvdjax.checkpoint import Progress
from qvdjax.errors import UserError
from qvdjax.metrics import bootstrap_interval, frechet_distance, psnr, ssim
from qvdjax.video import read_mp4

FEW = 256  # videos, below which an FVD says little
_NEEDED = {
    "clip_similarity": "--clip, the folder of a CLIPModel, and prompts in the JSON files beside the videos",
    "clip_temporal": "--clip, the folder of a CLIPModel",
    "lpips": "--reference, videos of the same names, and --lpips, the folder with AlexNet and LPIPS' heads",
    "fvd": "--reference and --i3d, the file i3d_torchscript.pt",
    "psnr": "--reference, videos of the same names",
    "ssim": "--reference, videos of the same names",
}


def score_videos(
    folder: Path,
    *,
    reference: Path | None = None,
    clip: Path | None = None,
    lpips: Path | None = None,
    i3d: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Score every mp4 of a folder by the metrics whose weights are named.

    Args:
        folder: Videos; the prompt of one stands in the JSON file beside it, as `sample` writes it.
        reference: Others under the same names, such as the full-precision model's at the same seeds. FVD compares all
            of either folder, whatever their names.
        clip: Folder of a CLIPModel of transformers, with tokenizer and preprocessor.
        lpips: Folder of AlexNet's weights and LPIPS' heads, see `weights`.
        i3d: i3d_torchscript.pt, or its folder.
        progress: Called with ("scoring", videos done, videos in all).

    Returns:
        {videos, scores, missing, notes, clip}: of each metric mean, low, high of a 95 % interval, and per_video, by
        name; `fvd` one number. Of metrics that were not computed, what they need; nothing stands in for their numbers.

    Raises:
        UserError: No videos, or damaged ones; names that the reference lacks; weights that are missing or other ones.
    """
    paths = _videos(folder)
    measures = {
        "pair": None if clip is None else ClipPair.load(clip),
        "lpips": None if lpips is None else load_lpips(lpips),
        "i3d": None if i3d is None else load_i3d(i3d),
    }
    others = {} if reference is None else {path.name: path for path in _videos(reference)}
    if i3d is not None and others and min(len(paths), len(others)) < 2:
        raise UserError("FVD compares sets of videos, and there is one alone", remedy="leave out --i3d, or sample more")
    if lacking := [path.name for path in paths if others and path.name not in others]:
        raise UserError(
            f"{reference} lacks videos of {folder}", remedy="sample the same prompts and seeds", items=lacking
        )
    scores: dict[str, dict[str, float]] = {}
    features: list[np.ndarray] = []
    for number, path in enumerate(paths, 1):
        video = read_mp4(path).frames
        other = read_mp4(others[path.name]).frames if others else None
        for name, value in _scores(video, other, _prompt(path), measures).items():
            scores.setdefault(name, {})[path.name] = value
        if measures["i3d"] and others:
            features.append(measures["i3d"](video))
        if progress:
            progress("scoring", number, len(paths))
    report: dict[str, Any] = {name: _summary(values) for name, values in scores.items()}
    notes = []
    if features:
        theirs = np.stack([measures["i3d"](read_mp4(path).frames) for path in others.values()])
        report["fvd"] = frechet_distance(np.stack(features), theirs)
        if min(len(features), len(theirs)) < FEW:
            notes.append(f"fvd of {len(features)} and {len(theirs)} videos is biased upwards; take {FEW} or more")
    return {
        "videos": len(paths),
        "scores": report,
        "missing": {name: need for name, need in _NEEDED.items() if name not in report},
        "notes": notes,
        "clip": None if clip is None else measures["pair"].fingerprint,
    }


def _videos(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("*.mp4")) if folder.is_dir() else []
    if not paths:
        raise UserError(f"{folder} holds no mp4", remedy="name a folder of videos")
    return paths


def _prompt(path: Path) -> str | None:
    """What a video's JSON file says; None without one."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return None
    try:
        prompt = json.loads(file.read_text(encoding="utf-8"))["prompt"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} says no prompt ({error})", remedy="restore it, or take it away") from None
    return prompt if isinstance(prompt, str) else None


def _scores(video: np.ndarray, other: np.ndarray | None, prompt: str | None, measures: dict) -> dict[str, float]:
    """Of one video, uint8 (frames, height, width, rgb)."""
    found, pair = {}, measures["pair"]
    if pair is not None:
        frames = pair.of_images(video)
        if prompt:
            found["clip_similarity"] = float((frames @ pair.of_texts([prompt])[0]).mean())
        if len(frames) > 1:
            found["clip_temporal"] = float((frames[1:] * frames[:-1]).sum(axis=1).mean())
    if other is None:
        return found
    if other.shape != video.shape:
        raise UserError(f"videos of shapes {video.shape} and {other.shape}", remedy="sample both at the same size")
    one, two = (array.astype(np.float32) / 255 for array in (video, other))
    found |= {"psnr": float(psnr(one, two).mean()), "ssim": float(ssim(one, two).mean())}  # means over frames
    if measures["lpips"] is not None:
        found["lpips"] = float(measures["lpips"](video, other).mean())
    return found


def _summary(values: dict[str, float]) -> dict[str, Any]:
    numbers: Sequence[float] = list(values.values())
    interval = bootstrap_interval(np.array(numbers))
    return {"mean": interval.mean, "low": interval.low, "high": interval.high, "per_video": values}
