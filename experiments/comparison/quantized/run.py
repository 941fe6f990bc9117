"""Quantize a bench model by every row and measure what is left of it.

    python -m experiments.comparison.quantized.run [--model wan-outlier] [--bits w4a4] [--seeds 0-2] [--rows RTN ...]

One JSON file a row and seed, in docs/results/ptq-<model>-<bits>; what is there is kept, so that an interrupted
comparison goes on. `python -m experiments.comparison.quantized.page` makes tables of them. A seed chooses the prompts
and noise of the calibration set, and the method's own random numbers; what is measured is the same for all.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

import jax

import models
import qvdjax
from experiments.calibrating import CAPTION_ORDER, FIRST_SEED, calibrate_folder, open_calibration
from experiments.cli.values import seeds as parse_seeds
from experiments.comparison.quantized.rows import ROWS, Row
from experiments.comparison.results import RESULTS, file_of
from experiments.evaluation import evaluate_many
from experiments.moving_shapes.captions import prompts
from experiments.moving_shapes.full_precision import CHECKPOINTS
from experiments.quantizing import save_quantized
from qvdjax.calibration import CalibrationSet
from qvdjax.errors import UserError

MEASURED: Final = ("teacher_forced_error", "psnr", "ssim", "oracle", "weight_bytes")


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
    """Quantize a folder by a row; returns `recipe` and `seconds`."""
    recipe, began = row.recipe(bits, seed), time.perf_counter()
    model = qvdjax.quantize(models.load(folder), recipe, batches if recipe.needs_calibration else None)
    seconds = time.perf_counter() - began
    save_quantized(model, folder, target)
    return {"recipe": recipe.name, "seconds": seconds}


def compare(folder: Path, rows: dict[str, Row], bits: str, seed: int, protocol: Protocol) -> dict[str, dict[str, Any]]:
    """Quantize and measure rows with one seed.

    Returns:
        By row: `recipe`, `seconds` of quantizing, and what `evaluate` measured (`MEASURED`).
    """
    with tempfile.TemporaryDirectory() as made:
        batches = calibration(folder, protocol, seed, Path(made) / "calibration")
        facts = {}
        for number, (name, row) in enumerate(rows.items()):
            facts[name] = quantized(folder, row, bits, seed, batches, Path(made) / f"row-{number}")
            print(f"{name}, seed {seed}: quantized in {facts[name]['seconds']:.0f} s", flush=True)
        folders = {name: Path(made) / f"row-{number}" for number, name in enumerate(rows)}
        report = evaluate_many(folder, folders, Path(made) / "report", count=protocol.clips)
        found = report["candidates"]
        return {name: {**facts[name], **{key: found[name][key] for key in MEASURED}} for name in rows}


def main(argv: list[str] | None = None) -> None:
    """Run what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comparison.quantized.run", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add, defaults = parser.add_argument, Protocol()
    add("--model", default="wan", help="shipped bench model")
    add("--bits", default="w4a4", help="of weights and activations")
    add("--seeds", default="0-2", help="one, a list or a range")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="NAME", help="rows of the table")
    add("--out", type=Path, help="folder of results (default: docs/results/ptq-MODEL-BITS)")
    for field in dataclasses.fields(Protocol):
        flag = f"--{field.name.replace('_', '-')}"
        add(flag, type=type(field.default), default=getattr(defaults, field.name), help="see Protocol")
    options = vars(parser.parse_args(argv))
    protocol = Protocol(**{field.name: options[field.name] for field in dataclasses.fields(Protocol)})
    out = options["out"] or RESULTS / f"ptq-{options['model']}-{options['bits']}"
    out.mkdir(parents=True, exist_ok=True)
    versions = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    for seed in parse_seeds(options["seeds"]):
        missing = {name: ROWS[name] for name in options["rows"] if not file_of(out, name, seed).exists()}
        if not missing:
            continue
        for name, found in compare(CHECKPOINTS / options["model"], missing, options["bits"], seed, protocol).items():
            facts = {"row": name, "seed": seed, **found, "protocol": dataclasses.asdict(protocol), **versions}
            file_of(out, name, seed).write_text(json.dumps(facts, indent=1) + "\n")
            print(f"{name}, seed {seed}: error {found['teacher_forced_error']['mean']:.4g}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"comparison: {error}", file=sys.stderr)
        sys.exit(2)
