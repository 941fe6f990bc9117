"""`python -m experiments.comparison.trained.page`: tables and curves of docs/results/qat-* from the JSON there."""

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.comparison.command import make_pages
from experiments.comparison.results import load, missing
from experiments.comparison.trained.rows import ROWS

COLUMNS = ("row", "recipe", "validation error", "before training", "PSNR dB", "colour", "shape", "direction")
SCORES = ("color", "shape", "direction")
INTRODUCTION = """\
# Trained methods, {bits} on the bench's {model}

Made by `python -m experiments.comparison.trained.page` from the JSON files in this folder, which
`python -m experiments.comparison.trained.run` wrote; do not edit it. All rows start from the same weights and have the
same teacher, clips, noise, steps and learning rate (each recipe's own rates relative to it); only recipe and seed
differ.

- **validation error** is the squared distance of predictions from the teacher's relative to their size, over
  {validation} held-out clips at noise levels as a sampler visits them; mean and range over the seeds. Lower is better.
- **PSNR** is of {clips} videos against the full-precision model's from the same seeds; colour, shape and direction are
  the oracle's scores of them.

{steps} steps of {batch} clips, learning rate {learning_rate}, seeds {seeds}, {device}, jax {jax}. One run is few steps
of a tiny model: an order that holds here is a reason to look at a real one, not a result about it.
"""
# Row, what it is expected to be ahead of: QVGen's tables, of which one leaves Phi out, and DSAQuant's.
EXPECTED = (
    ("QVGen", ("LSQ", "Q-DM", "EfficientDM", "QVGen without Phi")),
    ("DSAQuant", ("QVGen",)),
)
MOST_COST = 0.01  # of rank decay against keeping Phi


def page(folder: Path, results: dict[str, list[dict]]) -> str:
    """The page as Markdown."""
    _, model, bits = folder.name.split("-", 2)
    every = [one for many in results.values() for one in many]
    facts = {**every[0]["protocol"], "device": every[0]["device"], "jax": every[0]["jax"]}
    seeds = ", ".join(str(seed) for seed in sorted({one["seed"] for one in every}))
    lines = [
        INTRODUCTION.format(model=model, bits=bits.upper(), seeds=seeds, **facts),
        f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |",
        _full_precision(every[0]["full_precision"]), *(_row(name, many) for name, many in results.items()),
        "", *missing(results, list(ROWS)), "![gradient norms](gradient-norms.png)", "",
    ]  # fmt: skip
    if any("small_share" in one["curve"][0] for one in every):
        lines += ["![share of small singular values of Phi](small-shares.png)", ""]
    return "\n".join(lines + ["## What was expected, and what was found", "", *_findings(results), ""])


def _validation(many: list[dict]) -> float:
    return statistics.mean(one["result"]["validation"] for one in many)


def _row(name: str, many: list[dict]) -> str:
    def mean(part: str, key: str) -> float:
        return statistics.mean(one[part][key] for one in many)

    errors = [one["result"]["validation"] for one in many]
    note = f" ({ROWS[name].note})" if ROWS[name].note else ""
    cells = (
        f"{name}{note}", f"`{many[0]['recipe']}`", f"{_validation(many):.4g} ({min(errors):.4g} to {max(errors):.4g})",
        f"{mean('start', 'validation'):.4g}", f"{mean('result', 'psnr'):.2f}",
        *(f"{mean('result', score):.2f}" for score in SCORES),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _full_precision(scores: dict[str, float]) -> str:
    """The line of the teacher, which is no distance from itself."""
    return f"| full precision (the teacher) | | 0 | | | {' | '.join(f'{scores[name]:.2f}' for name in SCORES)} |"


def _findings(results: dict[str, list[dict]]) -> list[str]:
    """A line for each expectation whose rows are there: by how much, and in how many of the seeds they share."""
    lines = []
    for ahead, others in EXPECTED:
        for behind in others:
            if ahead in results and behind in results:
                change = _validation(results[ahead]) / _validation(results[behind]) - 1
                one, other = (
                    {result["seed"]: result["result"]["validation"] for result in results[name]}
                    for name in (ahead, behind)
                )
                shared = sorted(one.keys() & other.keys())
                wins = sum(one[seed] < other[seed] for seed in shared)
                verdict = "holds" if change < 0 else "**does not hold**"
                lines.append(
                    f"- {ahead} before {behind}: {verdict}, {100 * change:+.1f} % of validation error, better in "
                    f"{wins} of {len(shared)} seeds."
                )
    kept, decayed = results.get("QVGen, Phi kept"), results.get("QVGen")
    if kept and decayed:
        cost = _validation(decayed) / _validation(kept) - 1
        verdict = "holds" if cost < MOST_COST else "**does not hold**"
        lines.append(f"- Rank decay costs less than 1 % against keeping Phi: {verdict}, {100 * cost:+.1f} %.")
    return lines


def plot(results: dict[str, list[dict]], key: str, label: str, path: Path) -> None:
    """Curves of the first seed of every row that has them, to a PNG."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = matplotlib.figure.Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    for name, many in results.items():
        curve = [point for point in many[0]["curve"] if key in point]
        if curve:
            axis.plot([point["step"] for point in curve], [point[key] for point in curve], label=name)
    axis.set_xlabel("step")
    axis.set_ylabel(label)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write(folder: Path) -> list[Path]:
    """Write the page and its plots into a folder of results; returns the files."""
    results = load(folder, list(ROWS), "python -m experiments.comparison.trained.run")
    files = [folder / "README.md", folder / "gradient-norms.png"]
    files[0].write_text(page(folder, results))
    plot(results, "gradient_norm", "gradient norm before clipping", files[1])
    if any("small_share" in many[0]["curve"][0] for many in results.values()):
        files.append(folder / "small-shares.png")
        plot(results, "small_share", "share of Phi's singular values 14 times below the largest", files[-1])
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where there is nothing to make a page from."""
    return make_pages(
        arguments, program="experiments.comparison.trained.page", purpose=__doc__.partition(":")[2].strip(),
        kind="qat", write=write,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
