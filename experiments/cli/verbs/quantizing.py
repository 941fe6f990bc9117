"""Verbs on the way to a quantized model: recipes, calibrate, quantize."""

import dataclasses
from typing import Any

from experiments.cli import values
from experiments.cli.arguments import Calibrate, Quantize, Recipes
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress


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
        needs = (
            "needs calibration" if any(preset["needs_calibration"] for preset in own) else "no calibration"
        )
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
