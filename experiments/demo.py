"""The main job from end to end on the shipped model: convert, calibrate, quantize, sample, compare.

    make demo

Writes `demo-output/`: the converted and the quantized model folders, the calibration set, and `report/` with the
videos side by side. Prints a table of what was lost and what was saved.
"""

import argparse
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from experiments.cli.outcome import Table
from experiments.cli.platforms import settle
from experiments.cli.terminal import progress_bar, show
from qvdjax.errors import UserError

SHIPPED = Path(__file__).parent / "moving_shapes" / "checkpoints" / "wan"
RECIPES = tuple(f"{method}-{bits}" for method in ("rtn", "smoothquant") for bits in ("w8a8", "w4a8", "w4a4"))
STEPS = 10
"""Sampler steps: half of the folder's own, and enough to see every effect."""
CALIBRATION_PROMPTS, PROMPTS = 4, 8
COLUMNS = ("model", "weights", "of bf16", "teacher-forced error", "PSNR dB", "SSIM", "colour", "shape", "direction")


def main(argv: list[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, default=Path("demo-output"), help="replaced when it exists")
    output = parser.parse_args(argv).output
    settle()
    try:
        with progress_bar() as progress:
            report = run(output, progress)
    except UserError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    show(report)
    return 0


def run(output: Path, progress=None) -> list[str | Table]:
    """Do the job in `output`; returns what to print."""
    import conversion
    import qvdjax
    from experiments.calibrating import calibrate_folder
    from experiments.evaluation import evaluate_many
    from experiments.quantizing import quantize_folder
    from experiments.sampling.request import Settings

    started = time.perf_counter()
    _clear(output)
    reference = output / "wan"
    _say("converting the shipped checkpoint")
    conversion.convert(SHIPPED, reference, progress=progress)
    _say(f"calibrating: {CALIBRATION_PROMPTS} prompts, {STEPS} steps")
    calibration = output / "calibration"
    settings = Settings(steps=STEPS)
    calibrate_folder(reference, calibration, count=CALIBRATION_PROMPTS, settings=settings, progress=progress)
    quantized: dict[str, dict[str, Any]] = {}
    for recipe in RECIPES:
        _say(f"quantizing: {recipe}")
        quantized[recipe] = quantize_folder(
            reference, output / recipe, recipe, calibration=calibration, progress=progress
        )
    _say(f"sampling and comparing: {PROMPTS} prompts, {STEPS} steps, {len(RECIPES)} candidates")
    candidates = {recipe: output / recipe for recipe in RECIPES}
    result = evaluate_many(
        reference, candidates, output / "report", count=PROMPTS, steps=STEPS, command="make demo", progress=progress
    )
    execution, why = qvdjax.best_execution()
    return [
        _table(result["candidates"], quantized),
        f"Quantized products ran as '{execution}': {why}. Errors are means over {PROMPTS} prompts against the full-"
        "precision model at the same seeds; 'of bf16' counts all layers, those that stay float32 too.",
        f"Report with the videos side by side: {output / 'report' / 'report.html'}",
        f"{time.perf_counter() - started:.0f} seconds in all",
    ]


def _clear(output: Path) -> None:
    """Remove an earlier demo, and nothing that is not one."""
    mark = output / ".qvdjax-demo"
    if output.exists() and not mark.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is no earlier demo", remedy="move it away or give --output")
    shutil.rmtree(output, ignore_errors=True)
    try:
        output.mkdir(parents=True)
        mark.touch()
    except OSError as error:
        raise UserError(f"{output} cannot be written: {error.strerror}", remedy="give another --output") from error


def _table(candidates: dict[str, dict], quantized: dict[str, dict]) -> Table:
    first = next(iter(candidates.values()))
    scores = lambda part: [f"{part[name]['mean']:.2f}" for name in ("color", "shape", "direction")]  # noqa: E731
    full = quantized[next(iter(quantized))]["float_bytes"]
    rows = [
        (
            "full precision",
            f"{full / 2**20:.2f} MiB (bf16)",
            "1.00",
            "0",
            "-",
            "-",
            *scores(first["oracle"]["reference"]),
        )
    ]
    for name, metrics in candidates.items():
        rows.append((
            name, f"{quantized[name]['weight_bytes'] / 2**20:.2f} MiB", f"{quantized[name]['ratio']:.2f}",
            f"{metrics['teacher_forced_error']['mean']:.2e}", f"{metrics['psnr']['mean']:.1f}",
            f"{metrics['ssim']['mean']:.3f}", *scores(metrics["oracle"]["candidate"]),
        ))  # fmt: skip
    return Table(COLUMNS, rows, "What quantization cost and saved", right=frozenset(COLUMNS[1:]))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
