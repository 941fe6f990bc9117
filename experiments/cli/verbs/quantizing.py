"""Verbs on the way to a quantized model: recipes, calibrate, quantize, train."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from experiments.cli import values
from experiments.cli.arguments import Calibrate, Quantize, Recipes, Train
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.processes import joined
from experiments.cli.terminal import Progress

TRAINING = (
    "steps", "batch", "learning_rate", "warm_up", "data_weight", "seed", "mesh", "accumulate", "dtype", "teacher",
    "teacher_cache", "remat", "checkpoints", "save_every", "resume", "log", "tensorboard", "overwrite",
)  # fmt: skip


def recipes(arguments: Recipes, progress: Progress | None) -> Outcome:
    """List presets, and each method's options with their defaults."""
    from qvdjax.recipes import METHODS, get, method_of, names

    presets = []
    for name in names():
        method, weight_bits, activation_bits = method_of(name)
        presets.append(
            {
                "name": name,
                "method": method.name,
                "weight_bits": weight_bits,
                "activation_bits": activation_bits,
                "needs_calibration": get(name).needs_calibration,
            }
        )
    methods = [
        {"name": method.name, "summary": _first_sentence(method), "options": _options(method)}
        for method in METHODS.values()
    ]
    lines: list[str | Table] = []
    for method in methods:
        own = [preset for preset in presets if preset["method"] == method["name"]]
        needs = "needs calibration" if any(preset["needs_calibration"] for preset in own) else "no calibration"
        lines += [
            f"{method['name']}: {method['summary']} ({needs})",
            f"  {', '.join(preset['name'] for preset in own)}",
            f"  --set {', '.join(f'{name}={default}' for name, default in method['options'].items())}",
            "",
        ]
    lines.append("Any weight bits from 2 to 8 and activation bits from 2 to 8, or 16, make a recipe.")
    return Outcome({"recipes": presets, "methods": methods}, lines)


def _first_sentence(method: type) -> str:
    return " ".join((method.__doc__ or "").split("\n\n")[0].split())


def _options(method: type) -> dict[str, Any]:
    """Options that `--set` may override, with their defaults; the bits are in the recipe's name."""
    return {
        field.name: field.default
        for field in dataclasses.fields(method)
        if field.name not in ("weight_bits", "activation_bits")
    }


def quantize(arguments: Quantize, progress: Progress | None) -> Outcome:
    """Quantize a folder with a named recipe; of several processes the first one tells."""
    with joined(arguments) as first:
        from experiments.quantizing import quantize_folder

        report = quantize_folder(
            arguments.dir,
            arguments.out,
            arguments.recipe,
            overrides=values.overrides(arguments.set),
            calibration=arguments.calibration,
            mesh=values.mesh(arguments.mesh),
            overwrite=arguments.overwrite,
            other_sampler=arguments.other_sampler,
            progress=progress if first else None,
        )
    return Outcome(report, _facts(report, arguments.out) if first else [])


def train(arguments: Train, progress: Progress | None) -> Outcome:
    """Train a folder under a recipe's rounding and quantize it; of several processes the first one tells."""
    with joined(arguments) as first:
        from experiments.training import train_folder

        report = train_folder(
            arguments.dir,
            arguments.out,
            arguments.recipe,
            arguments.data,
            overrides=values.overrides(arguments.set),
            progress=progress if first else None,
            tell=lambda line: print(f"qvdjax: {line}", file=sys.stderr) if first else None,
            **{name: getattr(arguments, name) for name in TRAINING},
        )
    if not first:
        return Outcome(report, [])
    done = report["steps"] - report["first_step"]
    before, after = number(report["first_loss"]), number(report["last_loss"])
    line = f"{done} steps on {report['examples']} examples: loss {before} -> {after}"
    return Outcome(report, [*_facts(report, arguments.out), line])


def _facts(report: dict[str, Any], out: Path) -> list[str | Table]:
    """What became of a folder, a row for each kind of layer, and its bytes."""
    kinds: dict[tuple, list[dict[str, Any]]] = {}
    for row in report["layers"]:
        kinds.setdefault((row["role"], row["weight_bits"], row["activation_bits"], row["reason"]), []).append(row)
    rows = [
        (
            role,
            len(members),
            weight_bits or "-",
            activation_bits or "-",
            size(sum(row["bytes"] for row in members)),
            number(_lowest([row["sqnr_db"] for row in members])),
            reason,
        )
        for (role, weight_bits, activation_bits, reason), members in kinds.items()
    ]
    columns = ("role", "layers", "weights", "inputs", "bytes", "lowest SQNR dB", "why")
    held, before = size(report["weight_bytes"]), size(report["float_bytes"])
    return [
        Table(columns, rows, f"{out}: {report['recipe']}", frozenset(columns[1:-1])),
        f"{before} in bfloat16 -> {held} ({report['ratio']:.3f})",
        f"every layer: qvdjax info {out}",
    ]


def _lowest(ratios: list[float | None]) -> float | None:
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def calibrate(arguments: Calibrate, progress: Progress | None) -> Outcome:
    """Record a model's inputs while it samples prompts."""
    from experiments.calibrating import calibrate_folder
    from experiments.sampling.request import Settings

    report = calibrate_folder(
        arguments.dir,
        arguments.out,
        prompts=values.prompts(arguments.prompt, arguments.prompts),
        count=arguments.count,
        seeds=values.seeds(arguments.seeds),
        context_file=arguments.context,
        settings=Settings(**{name: getattr(arguments, name) for name in values.SETTINGS}),
        mesh=values.mesh(arguments.mesh),
        progress=progress,
    )
    line = f"{report['folder']}: {report['samples']} samples of {report['steps']} steps"
    return Outcome(report, [f"{line}, {report['model_inputs']} inputs of the model"])
