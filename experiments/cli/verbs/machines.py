"""Verbs about hardware: bench times layers, plan compiles for slices that are not here."""

import os

from experiments.cli import values
from experiments.cli.arguments import Bench, Plan
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress

BENCH_COLUMNS = ("name", "shape", "median ms", "spread ms", "full precision ms", "ratio", "ceiling")
DEFAULT_RECIPES = ("rtn-w8a8", "rtn-w4a8")
BENCH_NUMBERS = ("median_ms", "spread_ms", "reference_median_ms", "ratio", "ceiling")


def plan(arguments: Plan, progress: Progress | None) -> Outcome:
    """Compile one step for a TPU slice."""
    # libtpu describes the slice; jax itself runs on this machine's CPU and asks no metadata server.
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from experiments.planning import plan

    report = plan(
        arguments.model,
        arguments.recipe,
        arguments.topology,
        batch=arguments.batch,
        mesh=values.mesh(arguments.mesh),
        step=arguments.step,
        size=arguments.size,
        accumulate=arguments.accumulate,
        overrides=values.overrides(arguments.set),
        teacher=arguments.teacher,
        teacher_cache=arguments.teacher_cache,
        effort=arguments.effort,
    )
    answer = "fits" if report["fits"] else "does not fit"
    needs, has = (size(report[key]) if report[key] else "?" for key in ("bytes_per_chip", "chip_bytes"))
    lines: list[str | Table] = [
        f"{arguments.model}, {arguments.recipe}, {arguments.step} step on {arguments.topology}: {answer}",
        f"{needs} of {has} a chip; compiled in {number(report['compile_seconds'])} s",
    ]
    if report["bound_seconds"] is not None:
        least, by = number(report["bound_seconds"]), report["bound_by"]
        lines.append(f"at least {least} s a step by {by} at published peak rates: arithmetic, not a measurement")
    if report["collectives"]:
        rows = [(row["kind"], row["dtype"], size(row["bytes"])) for row in report["collectives"]]
        lines.append(Table(("collective", "type", "bytes a chip"), rows, right=frozenset({"bytes a chip"})))
    return Outcome(report, lines)


def bench(arguments: Bench, progress: Progress | None) -> Outcome:
    """Time a suite of shapes, full precision and quantized alternating."""
    from experiments.bench import run_bench

    report = run_bench(
        arguments.suite,
        recipes=arguments.recipe or DEFAULT_RECIPES,
        repeats=arguments.repeats,
        output=arguments.output,
        budget_seconds=arguments.budget,
        progress=progress,
    )
    rows = [(row["name"], row["shape"], *(number(row[key]) for key in BENCH_NUMBERS)) for row in report["results"]]
    lines: list[str | Table] = [Table(BENCH_COLUMNS, rows, report["device"], frozenset(BENCH_COLUMNS[2:]))]
    lines += [f"left out: {row['name']} {row['shape']}: {row['reason']}" for row in report["left_out"]]
    if arguments.output is not None:
        lines.append(f"written to {arguments.output}")
    failed = [f"{row['name']} {row['shape']} failed: {row['reason']}" for row in report["failed"]]
    return Outcome(report, lines, missed=failed)
