"""From numbers a sample to the entries of metrics.json: means over prompts with bootstrap intervals."""

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.evaluation.measuring import Fidelity
from qvdjax.metrics import bootstrap_interval, paired_difference


def per_prompt(values: np.ndarray, prompt_of_sample: Sequence[int]) -> np.ndarray:
    """Mean over the seeds of each prompt: (..., samples) -> (..., prompts).

    Prompts, not samples, are what the bootstrap resamples: two seeds of one prompt are not independent
    evidence about other prompts.
    """
    groups = np.asarray(prompt_of_sample)
    return np.stack([values[..., groups == prompt].mean(axis=-1) for prompt in np.unique(groups)], axis=-1)


def entry(values: np.ndarray) -> dict:
    """{mean, low, high, per_prompt} of (prompts,)."""
    return {**bootstrap_interval(values).to_dict(), "per_prompt": values.tolist()}


def by_step(values: np.ndarray) -> dict:
    """{mean, low, high}, lists over steps, of (steps, prompts)."""
    intervals = [bootstrap_interval(row) for row in values]
    return {name: [getattr(interval, name) for interval in intervals] for name in ("mean", "low", "high")}


def fidelity_entries(fidelity: Fidelity, prompt_of_sample: Sequence[int], timesteps: Sequence[float]) -> dict:
    """`teacher_forced_error`, `trajectory_error`, `psnr` and `ssim` of metrics.json.

    Args:
        timesteps: The sampler's, (steps,), in 0..1000.
    """
    teacher_forced = per_prompt(fidelity.teacher_forced, prompt_of_sample)  # (steps, prompts)
    trajectory = per_prompt(fidelity.trajectory, prompt_of_sample)  # (steps + 1, prompts)
    timesteps = [float(value) for value in timesteps]
    entries = {
        "teacher_forced_error": {
            **entry(teacher_forced.mean(axis=0)),  # (steps, prompts) -> (prompts,)
            "by_step": {"timesteps": timesteps, **by_step(teacher_forced)},
        },
        "trajectory_error": {
            **entry(trajectory[-1]),
            "by_step": {"timesteps": [*timesteps, 0.0], **by_step(trajectory)},
        },
    }
    for name in ("psnr", "ssim"):
        values = getattr(fidelity, name)
        entries[name] = None if values is None else entry(per_prompt(values, prompt_of_sample))
    return entries


def both_entries(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], prompt_of_sample: Sequence[int]
) -> dict:
    """{measure: {reference: entry, candidate: entry}} of what each model has by itself, (samples,) each."""
    return {
        name: {
            "reference": entry(per_prompt(reference[name], prompt_of_sample)),
            "candidate": entry(per_prompt(candidate[name], prompt_of_sample)),
        }
        for name in reference
    }


def oracle_entry(
    reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray], prompt_of_sample: Sequence[int]
) -> dict:
    """{reference: {color, shape, direction: entry}, candidate: ...} of scores in 0..1, (samples,) each."""
    return {
        side: {name: entry(per_prompt(np.asarray(scores[name]), prompt_of_sample)) for name in scores}
        for side, scores in (("reference", reference), ("candidate", candidate))
    }


def paired_entries(metrics: Mapping[str, Mapping]) -> list[dict]:
    """Every pair of candidates compared prompt by prompt.

    Args:
        metrics: metrics.json of each candidate, by name, all against one reference on the same prompts
            and seeds.

    Returns:
        One row a pair and measure: {first, second, measure, mean, low, high, excludes_zero}; mean is
            first - second.
    """
    names = list(metrics)
    rows = []
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            for measure in ("teacher_forced_error", "psnr", "ssim"):
                if metrics[first][measure] is None or metrics[second][measure] is None:
                    continue
                difference = paired_difference(
                    metrics[first][measure]["per_prompt"], metrics[second][measure]["per_prompt"]
                )
                rows.append(
                    {
                        "first": first,
                        "second": second,
                        "measure": measure,
                        **difference.to_dict(),
                        "excludes_zero": difference.excludes_zero,
                    }
                )
    return rows
