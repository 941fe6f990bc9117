"""`qvdjax bench`: time full precision and quantized layers at named shapes, in one run."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments.bench.cases import DEVICE_ERRORS, Case, cases, step_bytes, step_case
from experiments.bench.ceilings import ceiling
from experiments.bench.peaks import machine, matrix_rates, memory_bytes
from experiments.bench.shapes import SHAPES, shape
from experiments.bench.timing import Timed, measure
from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError
from qvdjax.recipes import get

RECIPES = ("rtn-w8a8", "rtn-w4a8")
SUITES = ("default", *SHAPES)
# Weights of all variants of a step may take this part of the memory; the rest is for activations and copies.
STEP_MEMORY = 0.6
Progress = Callable[[str, int, int], None]


def run_bench(
    suite: str = "default",
    shapes: Sequence[str] | None = None,
    recipes: Sequence[str] = RECIPES,
    repeats: int = 7,
    output: str | os.PathLike | None = None,
    budget_seconds: float = math.inf,
    progress: Progress | None = None,
) -> dict:
    """Time each case of the shapes, full precision and quantized alternating, and compare with the ceiling.

    Outputs are compared with the full-precision ones before anything is timed. On an accelerator full
    precision is bfloat16 with the fastest attention there is (cuDNN's on a GPU); on a CPU it is float32.

    Args:
        suite: "default" (the Wan shapes on an accelerator, "tiny" on a CPU), or the name of a shape.
        shapes: Names of shapes, instead of the suite's.
        recipes: Quantizations of the linear layers.
        repeats: Rounds of the alternation; medians and spreads are over them.
        output: JSON file, written whole after every case.
        budget_seconds: No new case is begun after this; what was left out is listed under `left_out`.
        progress: Called with a stage, the cases done and their number.

    Returns:
        `results`: rows of {name, shape, device, median_ms, spread_ms, reference_median_ms, ratio, ceiling,
        ...} (see docs/benchmarks), `rates` (measured matrix rates), `failed` and `left_out` ({name, shape,
        reason}), and the machine, versions and settings.

    Raises:
        UserError: Unknown suite, shape or recipe, or fewer than one repeat.
    """
    chosen = [shape(name) for name in (_suite(suite) if shapes is None else shapes)]
    if repeats < 1:
        raise UserError(f"{repeats} repeats", remedy="give at least 1")
    for name in recipes:
        get(name)  # an unknown one is said before anything is timed
    begin = time.monotonic()
    on_cpu = jax.default_backend() == "cpu"
    dtype = jnp.float32 if on_cpu else jnp.bfloat16
    report = {
        "suite": suite, "shapes": [s.name for s in chosen], "recipes": list(recipes), "repeats": repeats,
        "attention_reference": "cudnn" if jax.default_backend() == "gpu" else "xla", **machine(),
        "rates": matrix_rates(dtype, repeats), "results": [], "failed": [], "left_out": [], "seconds": 0.0,
    }  # fmt: skip
    total, done = 4 * len(chosen), 0
    for chosen_shape in chosen:
        failed = functools.partial(_failed, report, "block", chosen_shape.name)
        small = cases(chosen_shape, recipes, dtype, attention_in_block=not on_cpu, failed=failed)
        for kind in ("linear", "attention", "block", "step"):
            if progress is not None:
                progress(f"{chosen_shape.name} {kind}", done, total)
            if time.monotonic() - begin > budget_seconds:
                row = {
                    "name": kind,
                    "shape": chosen_shape.name,
                    "reason": f"the budget of {budget_seconds:g} s",
                }
                report["left_out"].append(row)
            elif kind == "step":
                _time_step(chosen_shape, recipes, dtype, repeats, report)
            else:
                _time_case(next(small), repeats, report)
            done += 1
            report["seconds"] = time.monotonic() - begin
            if output is not None:
                # Replaced at once: a run that is cut short leaves the last whole report.
                with new_file(output) as temporary:
                    temporary.parent.mkdir(parents=True, exist_ok=True)
                    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if progress is not None:
        progress("done", total, total)
    return report


def run(suite: str = "default", *, progress: Progress | None = None) -> dict:
    """What the command line calls: `run_bench` with its defaults."""
    return run_bench(suite, progress=progress)


def _suite(name: str) -> list[str]:
    if name not in SUITES:
        raise UserError(f"unknown suite {name!r}", remedy=f"choose from {', '.join(SUITES)}")
    if name != "default":
        return [name]
    return ["tiny"] if jax.default_backend() == "cpu" else [s for s in SHAPES if s != "tiny"]


def _time_step(chosen_shape, recipes, dtype, repeats, report) -> None:
    """The whole model where it fits beside its quantized forms, else one block's time times the blocks."""
    needed, available = step_bytes(chosen_shape, recipes, dtype), memory_bytes()
    if available is None or needed <= STEP_MEMORY * available:
        try:
            failed = functools.partial(_failed, report, "step", chosen_shape.name)
            _time_case(step_case(chosen_shape, recipes, dtype, failed), repeats, report)
        except DEVICE_ERRORS as error:
            _failed(report, "step", chosen_shape.name, "reference", error)
        return
    reason = f"{needed / 2**30:.0f} GiB of weights do not fit: one block's time by {chosen_shape.layers} blocks"
    for row in [r for r in report["results"] if r["kind"] == "block" and r["shape"] == chosen_shape.name]:
        scaled = {
            key: row[key] * chosen_shape.layers
            for key in ("median_ms", "spread_ms", "reference_median_ms", "reference_spread_ms", "tera_ops")
        }
        variant = row["name"].partition("/")[2]
        report["results"].append({**row, **scaled, "kind": "step", "name": f"step/{variant}", "scaled": reason})


def _time_case(case: Case, repeats: int, report: dict) -> None:
    """Compile, compare and time the variants of a case; a variant that fails is listed with its reason."""
    timed, errors = {}, {}
    truth = None
    for variant in case.variants:
        try:
            timed[variant.label] = function = Timed(variant.function, *variant.arguments)
        except DEVICE_ERRORS as error:
            _failed(report, case.kind, case.shape.name, variant.label, error)
            continue
        output, function.output = case.compared(function.output), None  # keep no full output while timing
        if truth is None:
            truth = output if case.truth is None else case.truth()
        errors[variant.label] = relative_error(output, truth)
    del truth
    reference = case.variants[0]
    if reference.label not in timed:
        return
    measured = dict(zip(timed, measure(list(timed.values()), repeats), strict=True))
    first = measured[reference.label]
    for variant in case.variants[1:]:
        if variant.label not in timed:
            continue
        time_ = measured[variant.label]
        factors = {f"{kind}_factor": report["rates"]["factor"] for kind in variant.quantized}
        report["results"].append({
            "name": f"{case.kind}/{variant.label}",
            "shape": case.shape.name,
            "device": report["device"],
            "kind": case.kind,
            "median_ms": time_.median_ms,
            "spread_ms": time_.spread_ms,
            "reference": f"{case.kind}/{reference.label}",
            "reference_median_ms": first.median_ms,
            "reference_spread_ms": first.spread_ms,
            "ratio": first.median_ms / time_.median_ms,
            "ceiling": ceiling(case.work, **factors),
            "relative_error": errors[variant.label],
            "reference_relative_error": errors[reference.label],
            "compared_with": f"{reference.label} output" if case.truth is None else "float32",
            "tera_ops": case.work.total / 1e12,
            "weight_bytes": variant.weight_bytes,
            "reference_weight_bytes": reference.weight_bytes,
            "rounds": time_.rounds,
            "compile_seconds": timed[variant.label].compile_seconds,
            "scaled": None,
        })  # fmt: skip


def _failed(report: dict, kind: str, shape_name: str, label: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300]}"
    report["failed"].append({"name": f"{kind}/{label}", "shape": shape_name, "reason": reason})


@jax.jit
def _relative_error(output, truth):
    output, truth = (a.astype(jnp.float32) for a in (output, truth))
    return jnp.sqrt(((output - truth) ** 2).sum() / (truth**2).sum())


def relative_error(output: jax.Array, truth: jax.Array) -> float:
    """||output - truth|| / ||truth||, in float32."""
    return float(_relative_error(output, truth))
