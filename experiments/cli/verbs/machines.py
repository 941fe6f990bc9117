"""Verbs about hardware: bench times layers, plan compiles for slices that are not here."""

import os
import tempfile

from experiments.cli import values
from experiments.cli.arguments import Bench, Plan
from experiments.cli.outcome import Outcome, Table, number, size, to_json
from experiments.cli.terminal import Progress

BENCH_COLUMNS = ("name", "shape", "median ms", "spread ms", "full precision ms", "ratio", "ceiling")


def bench(arguments: Bench, progress: Progress | None) -> Outcome:
    """Time a suite of shapes, full precision and quantized alternating."""
    from experiments import bench

    report = bench.run(arguments.suite, progress=progress)
    rows = [
        (row["name"], row["shape"])
        + tuple(
            number(row[key]) for key in ("median_ms", "spread_ms", "reference_median_ms", "ratio", "ceiling")
        )
        for row in report["results"]
    ]
    device = report["results"][0]["device"] if report["results"] else "no device"
    lines: list = [Table(BENCH_COLUMNS, rows, f"{arguments.suite} on {device}", frozenset(BENCH_COLUMNS[2:]))]
    if arguments.output is not None:
        _write_whole(arguments.output, to_json(report))
        lines.append(f"written to {arguments.output}")
    return Outcome(report, lines)


def plan(arguments: Plan, progress: Progress | None) -> Outcome:
    """Compile one step for a TPU slice."""
    # Compiling for another machine runs on this one's CPU, and asks no metadata server about the slice.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
