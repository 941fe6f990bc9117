"""The comparison from folder to folder: one reference, one or more candidates, a report."""

import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

import models
from experiments.evaluation import provenance, summary
from experiments.evaluation import thresholds as limits
from experiments.evaluation.ceiling import speed_ceiling_of_folder
from experiments.evaluation.measuring import TEMPORAL_MEASURES, compare_runs, video_distance
from experiments.evaluation.observing import Observation, observe
from experiments.evaluation.options import Options
from experiments.evaluation.report import render
from experiments.evaluation.report_folder import METRICS, REPORT, VIDEOS, check_target
from experiments.evaluation.same_model import check_same_model
from experiments.evaluation.scoring import NO_DECODER, why_no_oracle
from experiments.evaluation.sections import Clip
from experiments.evaluation.setup import Setup, make_setup
from qvdjax.checkpoint.atomic import disk_errors, new_folder
from qvdjax.errors import UserError
from qvdjax.nn import check_timesteps
from qvdjax.video import side_by_side, write_mp4

MAXIMUM_CLIPS = 8
"""Videos in a report; metrics.json has the numbers of all."""

PANEL_HEIGHT = 256
"""Pixels that small videos are enlarged to, or nearly: eight times the moving shapes' 32."""


def evaluate(reference: Path, candidate: Path, output: Path, **options) -> dict:
    """Compare a candidate with its reference at the same prompts and seeds, and write a report.

    Both models sample from the same noise. Besides, the candidate predicts at the latents of the reference
    (teacher forcing), which separates the error of quantization from the drift it causes.

    Args:
        reference: Model folder, full precision as a rule. Its `pipeline.json` holds the sampling defaults for
            both; a folder without one needs a context file.
        candidate: Model folder of the same architecture and size.
        output: Report folder, new or in place of an older report: metrics.json, report.html, videos/*.mp4.
        options: Fields of `Options`.

    Returns:
        What metrics.json holds. A missed threshold is not an error: `passed` is False then and `failures`
        has a line for each.

    Raises:
        UserError: A missing or corrupt folder, different architectures or sizes, tables over other timesteps, an
            unknown word in a prompt, an unknown threshold, a target that cannot be written, values that are not finite.
    """
    name = Path(candidate).resolve().name
    comparison = _compare(Path(reference), {name: Path(candidate)}, Path(output), Options(**options))
    metrics = comparison.metrics[name]
    _write(comparison, Path(output), metrics)
    return metrics


def evaluate_many(reference: Path, candidates: Mapping[str, Path], output: Path, **options) -> dict:
    """As `evaluate`, for several candidates by name. The reference runs once; models are held one at a time.

    Returns:
        {"candidates": {name: what `evaluate` returns}, "paired": rows of `summary.paired_entries`}, which
        is also what metrics.json holds.
    """
    if not candidates:
        raise UserError("no candidate was named", remedy="name at least one model folder")
    folders = {name: Path(folder) for name, folder in candidates.items()}
    comparison = _compare(Path(reference), folders, Path(output), Options(**options))
    result = {"candidates": comparison.metrics, "paired": comparison.paired}
    _write(comparison, Path(output), result)
    return result


class _Comparison(NamedTuple):
    setup: Setup
    metrics: dict[str, dict]
    paired: list[dict]
    videos: list[np.ndarray | None]
    """Of the reference, then of every candidate: (samples, frames, height, width, 3) in [0, 1]."""


def _compare(reference: Path, candidates: Mapping[str, Path], output: Path, options: Options) -> _Comparison:
    thresholds = limits.expand(options.thresholds)
    check_target(output)
    for folder in candidates.values():
        check_same_model(reference, folder)
    setup = make_setup(reference, options)
    for folder in (reference, *candidates.values()):
        check_timesteps(models.skeleton(folder), setup.timesteps)
    oracle_reason = why_no_oracle(setup)
    video_reason = NO_DECODER if setup.pipeline is None else None
    limits.check_measurable(thresholds, oracle_reason=oracle_reason, video_reason=video_reason)
    shared = {
        "oracle_reason": oracle_reason,
        "video_reason": video_reason,
        "ceiling": speed_ceiling_of_folder(reference, setup),
        "sampling": _sampling(setup, options),
        "device": provenance.device(),
        "versions": provenance.versions(),
        "command": options.command or provenance.command_line(),
    }

    def observation(name: str, folder: Path, along: np.ndarray | None) -> Observation:
        return observe(folder, setup, options, name=name, along=along, oracle=oracle_reason is None)

    truth = observation("reference", reference, None)
    metrics, videos = {}, [truth.video]
    for name, folder in candidates.items():
        started = time.perf_counter()
        seen = observation(name, folder, truth.run.inputs)
        entries = _measures(truth, seen, setup)
        missed = limits.failures(thresholds, entries)
        metrics[name] = {
            **entries,
            "reference": {
                "name": reference.resolve().name,
                "folder": str(reference),
                "weight_bits": sorted({row["weight_bits"] for row in truth.layers if row["weight_bits"]}),
            },
            "candidate": {"name": name, "folder": str(folder)},
            **shared,
            "thresholds": thresholds,
            "passed": not missed,
            "failures": missed,
            "layers": seen.layers,
            "seconds": round(time.perf_counter() - started, 3),
        }
        videos.append(seen.video)
    return _Comparison(setup, metrics, summary.paired_entries(metrics), videos)


def _measures(truth: Observation, seen: Observation, setup: Setup) -> dict:
    """The part of metrics.json that was measured."""
    fidelity = compare_runs(truth.run, truth.velocity, seen.run, seen.velocity, truth.video, seen.video)
    groups = setup.prompt_of_sample
    oracle = None
    if truth.oracle is not None and seen.oracle is not None:
        oracle = summary.oracle_entry(truth.oracle, seen.oracle, groups)
    if truth.temporal is None or seen.temporal is None:
        temporal = dict.fromkeys(TEMPORAL_MEASURES)
    else:
        temporal = summary.both_entries(truth.temporal, seen.temporal, groups)
    return {
        **summary.fidelity_entries(fidelity, groups, setup.timesteps),
        **temporal,
        "oracle": oracle,
        "frechet_random_features": video_distance(truth.video, seen.video),
        "weight_bytes": {
            "reference": truth.weight_bytes,
            "candidate": seen.weight_bytes,
            "ratio": seen.weight_bytes / truth.weight_bytes,
        },
    }


def _sampling(setup: Setup, options: Options) -> dict:
    return {
        "prompts": list(setup.prompts),
        "samples": [
            {"prompt": prompt, "seed": seed} for prompt, seed in zip(setup.prompt_of_sample, setup.seeds, strict=True)
        ],
        "solver": setup.solver_fields,
        "steps": setup.steps,
        "guidance_scale": setup.guidance_scale,
        "dynamic_guidance": setup.dynamic_guidance,
        "guidance_until": setup.guidance_until,
        "first_frame_guidance": setup.first_frame_guidance,
        "guided_steps": setup.steps if setup.embedded else setup.guided_count,
        "negative_prompt": setup.negative_prompt,
        "latents": list(setup.latents_shape),
        "execution": options.execution,
        "mesh": dict(options.mesh) if options.mesh else None,
    }


def _write(comparison: _Comparison, output: Path, content: dict) -> None:
    """Make the report folder, whole or not at all."""
    setup = comparison.setup
    with new_folder(output, overwrite=True) as draft, disk_errors(output):
        clips = [] if setup.pipeline is None else _write_clips(comparison, draft / VIDEOS)
        text = json.dumps(content, indent=1, allow_nan=False)
        (draft / METRICS).write_text(text + "\n", encoding="utf-8")
        (draft / REPORT).write_text(render(comparison.metrics, clips, comparison.paired), encoding="utf-8")


def _write_clips(comparison: _Comparison, folder: Path) -> list[Clip]:
    setup, labels = comparison.setup, ["reference", *comparison.metrics]
    folder.mkdir()
    clips = []
    for index, (prompt, seed) in enumerate(zip(setup.prompt_texts, setup.seeds, strict=True)):
        if index == MAXIMUM_CLIPS:
            break
        file = folder / f"{index:02d}-{_slug(prompt)}-seed{seed}.mp4"
        panels = [videos[index] for videos in comparison.videos]
        scale = max(1, PANEL_HEIGHT // panels[0].shape[1])
        write_mp4(file, side_by_side(panels, labels, scale=scale), fps=setup.pipeline.fps)
        clips.append(Clip(prompt, seed, file.read_bytes()))
    return clips


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60]
