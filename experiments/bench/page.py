"""`python -m experiments.bench.page`: docs/benchmarks/README.md and its plots from the JSON files there."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.bench import estimates, training
from qvdjax.errors import UserError

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks"
REQUIRED = ("device", "versions", "rates", "results", "failed", "left_out", "command")

INTRODUCTION = """\
# Benchmarks

Made by `python -m experiments.bench.page` from the JSON files in this folder; do not edit it. Each file is
one run of `qvdjax bench` (or `python -m experiments.bench`) on one machine, with random weights and inputs.

- **ratio** is full-precision time over quantized time, both measured in the same run, in turns; above 1 is
  faster.
- **ceiling** is the best that ratio could be (Amdahl's law): every matrix product takes time in proportion to
  its operations, the quantized ones run faster by the device's own measured int8 rate over its float rate,
  and nothing but matrix products takes time. Convolutions count as quantized where the device multiplies their
  codes as int8 ([where not](../speed.md#devices)). Formulas: `experiments/bench/ceilings.py`.
- **spread** is the interquartile range over the rounds.
- **error** is ‖output − reference‖ / ‖reference‖ before timing; against a float32 computation for linear and
  attention, against the full-precision output for block and step. Random weights and inputs: it shows that
  the right thing was computed, not the quality of a trained model.
- **weights** are logical bits: a four-bit code counts half a byte.
- **of peak** is the time that the matrix products alone would take at the rates measured in the same run, over the
  measured time.
- **moved** is the least that can be read and written: weights by their logical bits, inputs and outputs.
- **by** is the implementation that the dispatcher chose ([why](../speed.md)).
- Rows in *italics* are other programs in the same run, against our full precision. Those that were not installed are
  listed below the table.
- `step` is one forward pass of the whole model, without guidance; `sample` two guided steps from noise to latents,
  `+one-batch` with both branches of the guidance in one batch. A recipe quantizes the linear layers and convolutions;
  `+int8-attention` also both products of attention.
"""

PENDING = """\
**Pending**: no accelerator was at hand yet. On one GPU of 80 GiB and more, in under ten minutes:

```bash
export XLA_PYTHON_CLIENT_PREALLOCATE=false # PyTorch needs memory too
qvdjax bench --suite full --repeats 5 --budget 540 --output docs/benchmarks/h200.json
python -m experiments.bench.page
```

It times kernels, blocks, steps and videos of Wan 1.3B and 14B at 480p and 720p, CogVideoX 2B and 5B, HunyuanVideo at
720p and AnimateDiff, beside PyTorch, torch.compile, torchao, diffusers and qwix where they are installed.
"""


def load(folder: Path) -> dict[str, dict]:
    """Reports by file name; UserError for a file that is no report."""
    reports = {}
    for path in sorted(folder.glob("*.json")):
        try:
            report = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise UserError(f"{path} cannot be read ({error})", remedy="write it again with `qvdjax bench`") from error
        missing = [key for key in REQUIRED if not isinstance(report, dict) or key not in report]
        if missing:
            raise UserError(f"{path} is no report of the bench", remedy="move it elsewhere", items=missing)
        reports[path.stem] = report
    if not reports:
        raise UserError(f"no JSON files in {folder}", remedy=f"write one: `qvdjax bench --output {folder}/NAME.json`")
    return reports


def page(reports: dict[str, dict], trained: dict[str, dict] | None = None, estimated: dict | None = None) -> str:
    """The page as Markdown; `trained` are reports of `experiments.bench.training`, `estimated` is one of
    `experiments.bench.estimates`."""
    sections = (_section(name, report) for name, report in reports.items())
    pending = [PENDING] if all(report.get("platform", "cpu") == "cpu" for report in reports.values()) else []
    further = (*estimates.section(estimated), *training.section(trained or {}))
    return "\n".join([INTRODUCTION, *pending, *sections, *further])


def _section(name: str, report: dict) -> str:
    rates, versions = report["rates"], report["versions"]
    memory = f", memory {rates['memory_giga_bytes']:.3g} GB/s" if "memory_giga_bytes" in rates else ""
    lines = [
        f"## {report['device']} ({name}.json)",
        "",
        f"jax {versions['jax']}, {versions['backend']}. Measured matrix rates at {rates['size']} x"
        f" {rates['size']}: {rates['float_dtype']} {rates['float_tera_ops']:.3g} TFLOP/s, int8"
        f" {rates['int8_tera_ops']:.3g} TOP/s ({rates['factor']:.2f} times){memory}. Command: `{report['command']}`.",
        "",
        f"![measured ratio and ceiling]({name}.png)",
        "",
        "| shape | what | ms | spread | full precision ms | ratio | ceiling | error | weights MiB | of peak |"
        " moved MiB | by |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *map(_row, report["results"]),
        "",
    ]
    scaled = sorted({f"{row['shape']} step: {row['scaled']}" for row in report["results"] if row["scaled"]})
    failed = [f"{row['name']} at {row['shape']} failed: {row['reason']}" for row in report["failed"]]
    left_out = [f"{row['name']} at {row['shape']} was left out: {row['reason']}" for row in report["left_out"]]
    notes = [f"- {line}" for line in (*scaled, *failed, *left_out)]
    return "\n".join(lines + notes + ([""] if notes else []))


def _row(row: dict) -> str:
    rival, error, peak, moved = (row.get(key) for key in ("rival", "relative_error", "fraction_of_peak", "least_bytes"))
    cells = (
        row["shape"], f"*{row['name']}*" if rival else row["name"], f"{row['median_ms']:.3g}",
        f"{row['spread_ms']:.2g}", f"{row['reference_median_ms']:.3g}", f"**{row['ratio']:.2f}**",
        "" if rival else f"{row['ceiling']:.2f}", "" if error is None else f"{error:.1e}",
        _weights(row) if row["weight_bytes"] else "", "" if peak is None else f"{peak:.2f}",
        "" if moved is None else f"{moved / 2**20:.3g}", row.get("implementation") or "",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _weights(row: dict) -> str:
    return f"{row['weight_bytes'] / 2**20:.3g} of {row['reference_weight_bytes'] / 2**20:.3g}"


def plot(report: dict, path: Path) -> None:
    """Bars of the measured ratios with a mark at each ceiling, one panel a shape, to a PNG."""
    import matplotlib.figure
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    shapes = list(dict.fromkeys(row["shape"] for row in report["results"]))
    largest = max((sum(row["shape"] == shape for row in report["results"]) for shape in shapes), default=1)
    size = (9, 1.2 + 0.35 * largest * max(1, len(shapes)))
    figure = matplotlib.figure.Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    for place, shape in enumerate(shapes):
        rows = [row for row in report["results"] if row["shape"] == shape][::-1]
        axis = figure.add_subplot(len(shapes), 1, place + 1)
        axis.barh(range(len(rows)), [row["ratio"] for row in rows], color="#4878a8", label="measured")
        axis.scatter(
            [row["ceiling"] for row in rows],
            range(len(rows)),
            marker="|",
            s=180,
            color="#c03028",
            label="ceiling",
        )
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.set_title(f"{shape}, {report['device']}", loc="left", fontsize=10)
        axis.set_xlabel("full-precision time / quantized time")
        if place == 0:
            axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write(folder: Path = FOLDER) -> list[Path]:
    """Write the page and one plot a report into the folder; returns the files."""
    reports = load(folder)
    files = [folder / "README.md"]
    trained = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "training").glob("*.json"))}
    estimated = folder / "estimates" / estimates.FILE
    files[0].write_text(page(reports, trained, json.loads(estimated.read_text()) if estimated.exists() else None))
    for name, report in reports.items():
        files.append(folder / f"{name}.png")
        plot(report, files[-1])
    return files


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 where there is nothing to make a page from."""
    parser = argparse.ArgumentParser(prog="experiments.bench.page", description=__doc__.partition(":")[2].strip())
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER, help="(default: %(default)s)")
    try:
        files = write(parser.parse_args(arguments).folder)
    except UserError as error:
        print(f"experiments.bench.page: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
