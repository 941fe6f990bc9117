"""Quantize a bench model by every row and measure what is left of it.

    python -m experiments.comparison.quantized.run [--model wan-outlier] [--bits w4a4] [--seeds 0-2] [--rows RTN ...]

One JSON file a row and seed, in docs/results/ptq-<model>-<bits>; what is there is kept, so that an interrupted
comparison goes on. `python -m experiments.comparison.quantized.page` makes tables of them. A seed chooses the prompts
and noise of the calibration set, and the method's own random numbers; what is measured is the same for all. Models
whose names begin with "animatediff" have rows of their own (`experiments.comparison.quantized.tables`).
"""

import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import jax

import models
import qvdjax
from experiments.calibrating import CAPTION_ORDER, FIRST_SEED, calibrate_folder, open_calibration
from experiments.comparison.command import asked, run
from experiments.comparison.quantized.feature_measures import feature_measures
from experiments.comparison.quantized.tables import table_of
from experiments.comparison.row import Row
from experiments.evaluation import evaluate_many
from experiments.moving_shapes.captions import prompts
from experiments.moving_shapes.full_precision import CHECKPOINTS
from experiments.quantizing import save_quantized
from qvdjax.calibration import CalibrationSet

TOGETHER: Final = 4  # rows that the full-precision model is sampled once for
# The same integers as floats. Integer products differ where a sum in another order moves an input to the next code, and
# take 2.5 times as long on a CPU without YNNPACK, which reconstruction does better without (docs/results).
EXECUTION: Final = "simulate"
MEASURED: Final = ("teacher_forced_error", "psnr", "ssim", "frechet_random_features", "oracle", "weight_bytes")


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What all rows have in common.

    Attributes:
        prompts: Of the calibration set, each sampled once.
        clips: Videos that are sampled, and at whose latents predictions are compared.
    """

    prompts: int = 10
    clips: int = 32


def calibration(folder: Path, protocol: Protocol, seed: int, target: Path) -> CalibrationSet:
    """The calibration set of a seed: captions in another order than any that is measured, and noise of its own."""
    captions = prompts(protocol.prompts, CAPTION_ORDER + seed)
    calibrate_folder(folder, target, prompts=captions, first_seed=FIRST_SEED * (1 + seed))
    return open_calibration(target, folder)


def quantized(folder: Path, row: Row, bits: str, seed: int, batches: CalibrationSet, target: Path) -> dict[str, Any]:
    """Quantize a folder by a row; returns `recipe`, `seconds`, `processor_seconds` of all cores meanwhile, and
    `temporal_features` (see `feature_measures`)."""
    recipe, whole = row.recipe(bits, seed), models.load(folder)
    began, began_processor = time.perf_counter(), time.process_time()
    model = qvdjax.quantize(whole, recipe, batches if recipe.needs_calibration else None)
    spent = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - began_processor}
    save_quantized(model, folder, target)
    return {"recipe": recipe.name, **spent, "temporal_features": feature_measures(whole, model, batches)}


def compare(folder: Path, rows: dict[str, Row], bits: str, seed: int, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Quantize and measure rows with one seed.

    Returns:
        By row: what `quantized` returns, and what `evaluate` measured (`MEASURED`).
    """
    with tempfile.TemporaryDirectory() as made:
        batches = calibration(folder, protocol, seed, Path(made) / "calibration")
        facts = {}
        for number, (name, row) in enumerate(rows.items()):
            facts[name] = quantized(folder, row, bits, seed, batches, Path(made) / f"row-{number}")
            print(f"{name}, seed {seed}: quantized in {facts[name]['seconds']:.0f} s", flush=True)
        folders = {name: Path(made) / f"row-{number}" for number, name in enumerate(rows)}
        report = evaluate_many(folder, folders, Path(made) / "report", count=protocol.clips, execution=EXECUTION)
        found = report["candidates"]
        measures = {name: {key: found[name][key] for key in MEASURED} for name in rows}
        return {name: {**facts[name], "execution": EXECUTION, **measures[name]} for name in rows}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, `TOGETHER` rows at a time with all seeds, which share the programs of the first."""
    wanted = asked(
        argv, program="experiments.comparison.quantized.run", purpose=__doc__.split("\n\n")[0],
        rows=lambda model: table_of(model).rows, protocol=Protocol, kind="ptq",
    )  # fmt: skip
    known = table_of(wanted.model).rows
    for first in range(0, len(wanted.rows), TOGETHER):
        group = wanted.rows[first : first + TOGETHER]
        for seed in wanted.seeds:
            rows = {name: known[name] for name in wanted.missing(seed) if name in group}
            if not rows:
                continue
            for name, found in compare(CHECKPOINTS / wanted.model, rows, wanted.bits, seed, wanted.protocol).items():
                wanted.keep(name, seed, found)
                print(f"{name}, seed {seed}: error {found['teacher_forced_error']['mean']:.4g}", flush=True)
        # Rows may share programs, but each program takes some of the 65,530 regions of memory that Linux gives a
        # process: four rows of UNets, two of whose blocks are trained, had more than half of them.
        jax.clear_caches()


if __name__ == "__main__":
    run(main)
