"""`python -m experiments.comparison.quantized.page`: tables of docs/results/ptq-* from the JSON files there."""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np

from experiments.comparison.command import make_pages
from experiments.comparison.quantized.tables import Table, table_of
from experiments.comparison.results import load, missing
from experiments.evaluation.plots import error_by_step
from qvdjax.metrics import Interval, paired_difference, relative_difference

PLOT, DRAWN = "error-by-step.png", 6
SCORES = {"color": "colour", "shape": "shape", "direction": "direction"}  # of the oracle, as the page calls them
COLUMNS = ("row", "recipe", "teacher-forced error", "PSNR dB", "SSIM", *SCORES.values(), "weights", "quantized in")
INTRODUCTION = """\
# Quantized without training weights, {bits} on the bench's {model}

Made by `python -m experiments.comparison.quantized.page` from the JSON files in this folder, which
`python -m experiments.comparison.quantized.run` wrote; do not edit it. All rows quantize the same layers to the same
bits, and see the same calibration set; a seed is of that set and of the method.

- **teacher-forced error** is the squared distance of predictions from the full-precision model's at its own latents,
  relative to their size, over all steps of {clips} videos; mean and range over the seeds. Lower is better.
- **PSNR** and **SSIM** are of these videos against the full-precision model's from the same noise; colour, shape and
  direction are the oracle's scores of them ({reference} in full precision).
- **weights** are KiB of the whole model, codes at their own bits, with scales and what is beside them ({whole} in
  float32).
- **quantized in** is the time that all cores spent on it, over the seeds that have it: several rows may have shared
  them, so that wall clock says little. "wall" is where only that was measured, two cores at work on one row.{more}

Calibrated on {prompts} prompts; seeds {seeds}, {device}, jax {jax}.
"""
MORE = {  # what columns mean that not every table has
    "frechet_random_features": """
- **Fréchet, random features** is the Fréchet distance of these videos from the full-precision model's on the features
  of fixed random convolutions. No network was trained for it: it is not FVD.""",
    "temporal_features": """
- **identity** and **collapse** are about the vector that tells blocks the timestep, as layers get it: the share of
  timesteps whose rounded vector is nearest to its own, and the share of numbers that differ between neighbouring
  timesteps and no longer do. **after the layer** is the signal-to-noise ratio of what the layers make of it, of that
  alone which changes with the timestep.""",
}


def model_and_bits(folder: Path) -> tuple[str, str]:
    """Of a folder of results, by its name."""
    model, _, bits = folder.name.removeprefix("ptq-").rpartition("-")
    return model, bits


def page(folder: Path, results: dict[str, list[dict]]) -> str:
    """The page as Markdown."""
    (model, bits), table = model_and_bits(folder), table_of(model_and_bits(folder)[0])
    first = next(iter(results.values()))[0]
    seeds = sorted({one["seed"] for many in results.values() for one in many})
    reference = ", ".join(f"{first['oracle']['reference'][score]['mean']:.2f}" for score in SCORES)
    whole = _size(first["weight_bytes"]["reference"])
    facts = {
        **first["protocol"], "device": first["device"], "jax": first["jax"], "reference": reference, "whole": whole,
    }  # fmt: skip
    told = [text for key, text in MORE.items() if first.get(key) is not None]
    further = tuple(_more(first))
    columns = (*COLUMNS, *further)
    return "\n".join([
        INTRODUCTION.format(
            model=model, bits=bits.upper(), seeds=", ".join(map(str, seeds)), more="".join(told), **facts
        ),
        f"| {' | '.join(columns)} |", f"| {' | '.join('---' for _ in columns)} |",
        *(_row(name, many, table, further) for name, many in results.items()), "", *missing(results, list(table.rows)),
        f"![error at each step of the sampler, of the {DRAWN} rows of least error]({PLOT})", "",
        "## What was expected, and what was found", "", *_findings(results, table), *_scores(results, table), "",
    ])  # fmt: skip


def _more(result: dict) -> dict[str, float | None]:
    """Further columns that a result has, and their numbers."""
    found = {}
    if result.get("frechet_random_features") is not None:
        found["Fréchet, random features"] = result["frechet_random_features"]
    if result.get("temporal_features") is not None:
        sides = result["temporal_features"]
        found |= {
            "identity": sides["input"]["identity_rate"], "collapse": sides["input"]["collapse"],
            "after the layer dB": sides["output"]["centred_sqnr_db"],
        }  # fmt: skip
    return found


def _row(name: str, many: list[dict], table: Table, further: tuple[str, ...]) -> str:
    errors = [one["teacher_forced_error"]["mean"] for one in many]
    note = f" ({table.rows[name].note})" if table.rows[name].note else ""
    more = [_more(one) for one in many]
    cells = (
        f"{name}{note}", f"`{many[0]['recipe']}`", f"{mean(errors):.4g} ({min(errors):.4g} to {max(errors):.4g})",
        f"{mean(one['psnr']['mean'] for one in many):.2f}", f"{mean(one['ssim']['mean'] for one in many):.3f}",
        *(f"{mean(one['oracle']['candidate'][score]['mean'] for one in many):.2f}" for score in SCORES),
        _size(mean(one["weight_bytes"]["candidate"] for one in many)), _spent(many),
        *(_average([one.get(key) for one in more]) for key in further),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _size(count: float) -> str:
    """Bytes in KiB."""
    return f"{count / 2**10:,.0f}"


def _spent(many: list[dict]) -> str:
    """The time of all cores; wall clock where no result has that."""
    processor = [one["processor_seconds"] for one in many if "processor_seconds" in one]
    return f"{mean(processor):.0f} s" if processor else f"{mean(one['seconds'] for one in many):.0f} s wall"


def _hundredths(interval: Interval) -> tuple[float, float, float]:
    return 100 * interval.mean, 100 * interval.low, 100 * interval.high


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _average(values: list[float | None]) -> str:
    """Mean, or a dash where one is not finite or missing."""
    return "-" if None in values else f"{mean(values):.3g}"


def _errors(many: list[dict], seeds: list[int]) -> np.ndarray:
    """Mean over seeds of the error of each prompt, (prompts,)."""
    return np.mean([one["teacher_forced_error"]["per_prompt"] for one in many if one["seed"] in seeds], axis=0)


def _findings(results: dict[str, list[dict]], table: Table) -> list[str]:
    """A line for each expectation and each ablation whose rows are there, over the seeds that they share."""
    pairs = [(ahead, behind, True) for ahead, others in table.expected for behind in others]
    pairs += [(*ablation, False) for ablation in table.ablations]
    lines = []
    for one, other, expected in pairs:
        if one not in results or other not in results:
            continue
        seeds = sorted({r["seed"] for r in results[one]} & {r["seed"] for r in results[other]})
        ours, theirs = (_errors(results[name], seeds) for name in (one, other))
        interval = relative_difference(ours, theirs)
        change, low, high = _hundredths(interval)
        verdict = ("holds" if interval.high < 0 else "**does not hold**") + ", " if expected else ""
        relation = f"{one} before {other}" if expected else f"{one} against {other}"
        lines.append(
            f"- {relation}: {verdict}{change:+.1f} % of error ({low:+.1f} to {high:+.1f}, 95 % over prompts, "
            f"{_seeds(len(seeds))})."
        )
    return lines


def _scores(results: dict[str, list[dict]], table: Table) -> list[str]:
    """A line for each row that something is expected of: how far its oracle's scores are from full precision's."""
    lines = []
    for name, _ in table.expected:
        if name not in results:
            continue
        ours, whole = (
            {score: np.mean([one["oracle"][side][score]["per_prompt"] for one in results[name]], axis=0)
             for score in SCORES} for side in ("candidate", "reference")
        )  # fmt: skip
        pairs = {called: (ours[score], whole[score]) for score, called in SCORES.items()}
        pairs["their mean"] = tuple(np.mean(list(side.values()), axis=0) for side in (ours, whole))
        differences = []
        for called, pair in pairs.items():
            change, low, high = _hundredths(paired_difference(*pair))
            differences.append(f"{called} {change:+.1f} ({low:+.1f} to {high:+.1f})")
        clips, seeds = len(pairs["their mean"][0]), len(results[name])
        lines.append(
            f"- {name}, oracle against full precision in points of 100: {', '.join(differences)}, 95 % over {clips} "
            f"clips, {_seeds(seeds)}."
        )
    return lines


def plot(results: dict[str, list[dict]], table: Table) -> bytes:
    """Error at each step of the sampler with the first seed, of the rows of least error, ablations aside."""
    names = set(results) - {name for name, _ in table.ablations}
    best = sorted(names, key=lambda name: mean(one["teacher_forced_error"]["mean"] for one in results[name]))[:DRAWN]
    series = {name: results[name][0]["teacher_forced_error"]["by_step"] for name in best}
    return error_by_step(series, title="at the latents of full precision", label="relative squared error", first_step=1)


def write(folder: Path) -> list[Path]:
    """Write the page and its plot into a folder of results; returns the files."""
    table = table_of(model_and_bits(folder)[0])
    results = load(folder, list(table.rows), "python -m experiments.comparison.quantized.run")
    (folder / "README.md").write_text(page(folder, results))
    (folder / PLOT).write_bytes(plot(results, table))
    return [folder / "README.md", folder / PLOT]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where there is nothing to make a page from."""
    return make_pages(
        arguments, program="experiments.comparison.quantized.page", purpose=__doc__.partition(":")[2].strip(),
        kind="ptq", write=write,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
