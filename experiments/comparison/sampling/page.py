"""`python -m experiments.comparison.sampling.page`: the tables of docs/results/sampling-* from the JSON there."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.command import make_pages
from experiments.comparison.results import load, missing
from experiments.comparison.sampling.rows import ROWS
from experiments.comparison.sampling.run import SCORES
from qvdjax.metrics import bootstrap_interval, paired_difference

COLUMNS = ("row", "passes", "PSNR dB", "change of PSNR", "oracle", "change of oracle")
INTRODUCTION = """\
# Ways of sampling, on the bench's {model}

Made by `python -m experiments.comparison.sampling.page` from the JSON files in this folder, which
`python -m experiments.comparison.sampling.run` wrote; do not edit it. W8A8 and W4A4 are rounded to nearest (`rtn`),
with attention of 8 bits.

- **passes** is how often a video asks the model: twice in a guided step.
- **PSNR** is of the videos against those of the full-precision model with guidance in all steps, from the same noise;
  100 dB is where it ends.
- **oracle** is the mean of the scores of colour, shape and direction, in points of 100.
- **change** is against the row of the same model without anything behind the comma, clip by clip, with its 95 %
  interval over clips.

{clips} clips, {execution} execution, {device}, jax {jax}. A tiny model: what costs nothing here may cost on a real one.
"""


def page(folder: Path, results: dict[str, list[dict[str, Any]]]) -> str:
    """The page as Markdown."""
    rows = {name: many[0] for name, many in results.items()}
    first = next(iter(rows.values()))
    facts = {**first["protocol"], "device": first["device"], "jax": first["jax"]}
    lines = [
        INTRODUCTION.format(model=folder.name.removeprefix("sampling-"), **facts),
        f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |",
        *(_row(name, one, rows.get(name.partition(",")[0])) for name, one in rows.items()), "",
        *missing(results, list(ROWS)),
    ]  # fmt: skip
    return "\n".join(lines)


def _oracle(one: dict[str, Any]) -> np.ndarray:
    """Mean score of each clip, in points of 100."""
    return 100 * np.mean([one[name] for name in SCORES], axis=0)


def _row(name: str, one: dict[str, Any], base: dict[str, Any] | None) -> str:
    changes = ["", ""]
    if base is not None and base is not one:
        pairs = ((one["psnr"], base["psnr"], 2), (_oracle(one), _oracle(base), 1))
        changes = [_change(*pair) for pair in pairs]
    note = f" ({ROWS[name].note})" if ROWS[name].note else ""
    decibels, points = bootstrap_interval(one["psnr"]).mean, _oracle(one).mean()
    cells = (f"{name}{note}", f"{one['passes']}", f"{decibels:.2f}", changes[0], f"{points:.1f}", changes[1])
    return f"| {' | '.join(cells)} |"


def _change(ours, theirs, digits: int) -> str:
    interval = paired_difference(ours, theirs)
    mean, low, high = (f"{value:+.{digits}f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def write(folder: Path) -> list[Path]:
    """The page of a folder of results."""
    results = load(folder, list(ROWS), "python -m experiments.comparison.sampling.run")
    path = folder / "README.md"
    path.write_text(page(folder, results) + "\n")
    return [path]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    return make_pages(
        arguments, program="python -m experiments.comparison.sampling.page", purpose=__doc__.partition("\n")[0],
        kind="sampling", write=write,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
