"""`python -m experiments.bench`: the bench alone, where the rest of the command line is not installed."""

import argparse
import math
import sys

from experiments.bench import SUITES, run_bench
from qvdjax.errors import UserError


def main() -> int:
    """Run, print a table, and say where the JSON is. Exit code 2 for bad arguments, 1 when a case failed."""
    parser = argparse.ArgumentParser(prog="experiments.bench", description=run_bench.__doc__.partition("\n")[0])
    parser.add_argument("--suite", default="default", help=f"one of {', '.join(SUITES)} (default: %(default)s)")
    parser.add_argument("--shapes", nargs="+", help="shapes instead of the suite's")
    parser.add_argument("--recipes", nargs="+", default=["rtn-w8a8", "rtn-w4a8"], help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds (default: %(default)s)")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="begin no case after this")
    parser.add_argument("--output", metavar="FILE.json", help="written after every case")
    given = parser.parse_args()

    def progress(stage, done, total):
        print(f"[{done}/{total}] {stage}", file=sys.stderr, flush=True)

    try:
        report = run_bench(
            given.suite, given.shapes, given.recipes, given.repeats, given.output, given.budget, progress
        )
    except UserError as error:
        print(f"experiments.bench: {error}", file=sys.stderr)
        return 2
    print_table(report)
    return 1 if report["failed"] else 0


def print_table(report: dict) -> None:
    """The report's rows, and what failed or was left out."""
    rates = report["rates"]
    print(
        f"{report['device']}, jax {report['versions']['jax']}, {rates['float_dtype']}"
        f" {rates['float_tera_ops']:.3g} TFLOP/s, int8 {rates['int8_tera_ops']:.3g} TOP/s,"
        f" {report['seconds']:.0f} s"
    )
    columns = ("name", "shape", "ms", "spread", "reference", "ratio", "ceiling", "error")
    line = "{:36} {:18} {:>10} {:>8} {:>10} {:>6} {:>7} {:>8}"
    print(line.format(*columns))
    for row in report["results"]:
        numbers = (
            f"{row['median_ms']:.3f}", f"{row['spread_ms']:.3f}", f"{row['reference_median_ms']:.3f}",
            f"{row['ratio']:.2f}", f"{row['ceiling']:.2f}", f"{row['relative_error']:.1e}",
        )  # fmt: skip
        scaled = f"  ({row['scaled']})" if row["scaled"] else ""
        print(line.format(row["name"], row["shape"], *numbers) + scaled)
    for title in ("failed", "left_out"):
        for row in report[title]:
            print(f"{title.replace('_', ' ')}: {row['name']} at {row['shape']}: {row['reason']}")


if __name__ == "__main__":
    sys.exit(main())
