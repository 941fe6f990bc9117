"""`python -m experiments.comparison.features.page`: tables of docs/results/temporal-features-* from the JSON there."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from experiments.comparison.command import make_pages
from experiments.comparison.features.run import FILE, KIND
from experiments.evaluation.plots import COLORS, MARKERS
from experiments.figures import new_figure, png
from qvdjax.errors import UserError

PLOT, PROGRAM = "error-by-bits.png", "python -m experiments.comparison.features.page"
INTRODUCTION = """\
# Grids of temporal features, on the bench's {model}

Made by `{program}` from the JSON file in this folder, which
`python -m experiments.comparison.features.run` wrote; do not edit it. The vector that tells a UNet's blocks the
timestep is rounded, to {bits} bits, and nothing else is: no weight, no other input. It depends on the timestep alone,
so that all that a sampler meets is known.

The {layers} layers get vectors of {width} numbers at {timesteps} timesteps, from {lowest:.2f} to {largest:.2f},
{negative:.0%} of them below zero, of skewness {skewness:.1f}. {changing:.0%} of their energy changes with the timestep,
and only that can tell timesteps apart.

Bold is what `temporal_features=auto` takes at these bits, as `qvd` does; italic what `temporal_features=signal` does,
see `qvdjax/ptq/feature_grids.py`. Neither may take ranges of timesteps, which are TFMQ-DM's and our own, nor powers of
two as released, which take a bit more than is said. {device}, jax {jax}.
"""
MARKS: Final = {"collapse": "**", "signal": "_"}  # by score
Cell = Callable[[dict[str, Any]], str]


def _error(one: dict[str, Any]) -> str:
    return f"{one['error']['mean']:.2g}"


def _decibels(one: dict[str, Any]) -> str:
    return "-" if one["after"] is None else f"{one['after']:.1f}"


TABLES: Final[dict[str, tuple[str, Cell]]] = {
    "Error of predictions": (
        "Squared distance of predictions from those with the vectors as they are, relative to their size, over all "
        "steps of {prompts} prompts with and without guidance's. Lower is better.", _error,
    ),
    "Behind the layers": (
        "Signal-to-noise ratio in decibels of what the layers make of the vectors, of that alone which changes with "
        "the timestep. Higher is better.", _decibels,
    ),
    "Collapse": (
        "Share of the numbers that differ between neighbouring timesteps and no longer do when rounded. QVD's aim is "
        "a low one.", lambda one: f"{one['collapse']:.2f}",
    ),
    "Identity": (
        "Share of timesteps whose rounded vector is nearest to their own.", lambda one: f"{one['identity_rate']:.2f}",
    ),
    "Distances": (
        "Mean distance between the rounded vectors of two timesteps over that between their vectors. Noise alone makes "
        "it larger, so it decides nothing.", lambda one: f"{one['distance_ratio']:.2f}",
    ),
}  # fmt: skip


def page(facts: dict[str, Any]) -> str:
    """The page as Markdown."""
    by_place = {(one["row"], one["bits"]): one for one in facts["rows"]}
    names = list(dict.fromkeys(name for name, _ in by_place))
    bits = list(dict.fromkeys(bits for _, bits in by_place))
    lines = [
        INTRODUCTION.format(
            program=PROGRAM, model=facts["model"], layers=facts["layers"], device=facts["device"], jax=facts["jax"],
            bits=f"{min(bits)} to {max(bits)}", **facts["features"],
        ),
        f"![error of predictions, by bits, of each grid]({PLOT})",
        "",
    ]  # fmt: skip
    for title, (says, cell) in TABLES.items():
        lines += [f"## {title}", "", says.format(prompts=facts["prompts"]), ""]
        lines += [f"| grid | {' | '.join(f'{b} bits' for b in bits)} |", f"| --- |{' --- |' * len(bits)}"]
        for name in names:
            cells = (_marked(cell(by_place[name, b]), name, b, facts["chosen"]) for b in bits)
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, "## What is chosen", "", *_findings(by_place, facts), ""])


def _marked(text: str, name: str, bits: int, chosen: dict[str, dict[str, dict[str, int]]]) -> str:
    """A cell, marked where the grid is chosen for some layer: {score: {bits: {grid: layers}}}."""
    for score, mark in MARKS.items():
        if name in chosen[score][str(bits)]:
            text = f"{mark}{text}{mark}"
    return text


def _findings(by_place: dict[tuple[str, int], dict[str, Any]], facts: dict[str, Any]) -> list[str]:
    """A line for each number of bits: the grids that are chosen, and the one of least error, with their errors."""
    lines = []
    for bits in facts["chosen"]["collapse"]:
        rows = [one for (_, b), one in by_place.items() if b == int(bits)]
        best = min(rows, key=lambda one: one["error"]["mean"])
        named = [
            f"by {score} " + " and ".join(
                f"{name} ({count} of {facts['layers']} layers, error {_interval(by_place[name, int(bits)])})"
                for name, count in facts["chosen"][score][bits].items()
            ) for score in MARKS
        ]  # fmt: skip
        lines.append(f"- {bits} bits: {', '.join(named)}; the least error has {best['row']} ({_interval(best)}).")
    return lines


def _interval(one: dict[str, Any]) -> str:
    mean, low, high = (f"{one['error'][key]:.2g}" for key in ("mean", "low", "high"))
    return f"{mean}, {low} to {high}"


def plot(facts: dict[str, Any]) -> bytes:
    """Error of predictions against bits, a line a grid."""
    figure, axes = new_figure()
    figure.set_size_inches(8.5, 4.2)
    for index, name in enumerate(dict.fromkeys(one["row"] for one in facts["rows"])):
        own = [one for one in facts["rows"] if one["row"] == name]
        axes.plot(
            [one["bits"] for one in own], [one["error"]["mean"] for one in own], label=name, markersize=4,
            color=COLORS[index % len(COLORS)], marker=MARKERS[index % len(MARKERS)],
        )  # fmt: skip
    axes.set(yscale="log", xlabel="bits", ylabel="relative squared error of predictions")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(frameon=False, loc="outside right upper", fontsize=8)
    return png(figure)


def write(folder: Path) -> list[Path]:
    """Write the page and its plot into a folder of results; returns the files. UserError where there are none."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} holds no {FILE}", remedy="run python -m experiments.comparison.features.run")
    facts = json.loads((folder / FILE).read_text())
    (folder / "README.md").write_text(page(facts))
    (folder / PLOT).write_bytes(plot(facts))
    return [folder / "README.md", folder / PLOT]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where there is nothing to make a page from."""
    return make_pages(
        arguments, program=PROGRAM, purpose=__doc__.partition(":")[2].strip(), kind=KIND, write=write
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
