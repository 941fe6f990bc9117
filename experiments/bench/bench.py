"""`qvdjax bench`: time full precision and quantized layers at named shapes, in one run."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from experiments.bench import cases
from experiments.bench.cases import DEVICE_ERRORS, Case, logical_bytes
from experiments.bench.ceilings import ceiling, least_seconds
from experiments.bench.peaks import machine, matrix_rates, memory_bytes, memory_rate
from experiments.bench.rivals import TorchTimed, versions
from experiments.bench.shapes import DEFAULT, SHAPES, TINY, Shape, shape
from experiments.bench.timing import Timed, measure
from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError
from qvdjax.recipes import get

RECIPES = ("rtn-w8a8", "rtn-w4a8")
SUITES = ("default", "full", *SHAPES)
KINDS = ("linear", "attention", "block", "step")
# Weights of all variants of a step may take this part of the memory; the rest is for activations and copies.
STEP_MEMORY = 0.6
# Of which videos are made: one shape of each size of model that leaves time for it.
SAMPLED = ("wan2.1-1.3b-480p", "cogvideox-2b-480p", "animatediff-512")
# What other programs raise when they lack memory, an operation or a name that another version has.
RIVAL_ERRORS = (*DEVICE_ERRORS, AttributeError, ImportError, TypeError)
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
        suite: "default" (Wan at 480p on an accelerator, "tiny" on a CPU); "full" (all shapes, videos from noise and
            other programs' ways beside ours; small shapes of all families on a CPU), which times all kernels first,
            then blocks, steps and videos, so that a budget leaves out the largest; or the name of a shape.
        shapes: Names of shapes, instead of the suite's.
        recipes: Quantizations of the linear layers.
        repeats: Rounds of the alternation; medians and spreads are over them.
        output: JSON file, written whole after every case.
        budget_seconds: No new case is begun after this; what was left out is listed under `left_out`.
        progress: Called with a stage, the cases done and their number.

    Returns:
        `results`: rows of {name, shape, device, median_ms, spread_ms, reference_median_ms, ratio, ceiling,
        ...} (see docs/benchmarks), `rates` (measured matrix and memory rates), `failed` and `left_out` ({name, shape,
        reason}), `rivals` (versions of other programs, None for one that is not installed), and the machine, versions
        and settings.

    Raises:
        UserError: Unknown suite, shape or recipe, or fewer than one repeat.
    """
    tasks = _tasks(suite, shapes)
    if repeats < 1:
        raise UserError(f"{repeats} repeats", remedy="give at least 1")
    for name in recipes:
        get(name)  # an unknown one is said before anything is timed
    begin = time.monotonic()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    report = {
        "suite": suite, "shapes": list(dict.fromkeys(s.name for _, s in tasks)), "recipes": list(recipes),
        "repeats": repeats, "attention_reference": "cudnn" if jax.default_backend() == "gpu" else "xla", **machine(),
        "rates": {**matrix_rates(dtype, repeats), **memory_rate(dtype, repeats)}, "rivals": versions(), "results": [],
        "failed": [], "left_out": [], "seconds": 0.0,
    }  # fmt: skip
    for done, (kind, one) in enumerate(tasks):
        if progress is not None:
            progress(f"{one.name} {kind}", done, len(tasks))
        if time.monotonic() - begin > budget_seconds:
            reason = f"the budget of {budget_seconds:g} s"
            report["left_out"].append({"name": kind, "shape": one.name, "reason": reason})
        else:
            _time(kind, one, recipes, dtype, repeats, report, rivals=suite == "full")
        report["seconds"] = time.monotonic() - begin
        if output is not None:
            # Replaced at once: a run that is cut short leaves the last whole report.
            with new_file(output) as temporary:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if progress is not None:
        progress("done", len(tasks), len(tasks))
    return report


def run(suite: str = "default", *, progress: Progress | None = None) -> dict:
    """What the command line calls: `run_bench` with its defaults."""
    return run_bench(suite, progress=progress)


def _tasks(suite: str, names: Sequence[str] | None) -> list[tuple[str, Shape]]:
    """(kind, shape) in order."""
    if suite not in SUITES:
        raise UserError(f"unknown suite {suite!r}", remedy=f"choose from {', '.join(SUITES)}")
    on_cpu = jax.default_backend() == "cpu"
    if names is None and suite == "full":
        chosen = [shape(name) for name in (TINY if on_cpu else [s for s in SHAPES if s not in TINY])]
        return [
            (kind, one) for kind in (*KINDS, "sample") for one in chosen
            # A UNet has no block that stands for all; videos are made of one shape a family.
            if not (kind == "block" and one.is_unet) and (kind != "sample" or one.name in (*TINY, *SAMPLED))
        ]  # fmt: skip
    if names is None:
        names = [suite] if suite != "default" else TINY[:1] if on_cpu else DEFAULT
    chosen = [shape(name) for name in names]
    return [(kind, one) for one in chosen for kind in KINDS if not (kind == "block" and one.is_unet)]


def _time(kind: str, one: Shape, recipes: Sequence[str], dtype, repeats: int, report: dict, *, rivals: bool) -> None:
    """One case of one shape. A model that does not fit beside its quantized forms is one block's time times blocks."""
    failed = functools.partial(_failed, report, kind, one.name)
    if kind in ("step", "sample"):
        needed, available = cases.step_bytes(one, recipes, dtype), memory_bytes()
        if available is not None and needed > STEP_MEMORY * available:
            reason = f"{needed / 2**30:.0f} GiB of weights do not fit"
            if kind == "step":
                _scale(one, reason, report)
            else:
                report["left_out"].append({"name": kind, "shape": one.name, "reason": reason})
            return
    make = getattr(cases, f"{kind}_case")
    try:
        case = make(one, dtype) if kind == "attention" else make(one, recipes, dtype, failed)
        _time_case(case, repeats, report, rivals=rivals)
    except DEVICE_ERRORS as error:
        _failed(report, kind, one.name, "reference", error)


def _scale(one: Shape, reason: str, report: dict) -> None:
    """Rows of a step from those of the same shape's block."""
    reason = f"{reason}: one block's time by {one.layers} blocks"
    for row in [r for r in report["results"] if r["kind"] == "block" and r["shape"] == one.name]:
        scaled = {
            key: row[key] * one.layers
            for key in ("median_ms", "spread_ms", "reference_median_ms", "reference_spread_ms", "tera_ops",
                        "least_bytes")
        }  # fmt: skip
        variant = row["name"].partition("/")[2]
        report["results"].append({**row, **scaled, "kind": "step", "name": f"step/{variant}", "scaled": reason})


def _time_case(case: Case, repeats: int, report: dict, *, rivals: bool = False) -> None:
    """Compile, compare and time the variants of a case; a variant that fails is listed with its reason."""
    timed, errors, least = {}, {}, {}
    truth = None
    for variant in case.variants:
        try:
            timed[variant.label] = function = Timed(variant.function, *variant.arguments)
        except DEVICE_ERRORS as error:
            _failed(report, case.kind, case.shape.name, variant.label, error)
            continue
        # Keep no full output while timing.
        whole, function.output = function.output, None
        least[variant.label] = logical_bytes((variant.arguments, whole))
        output = case.compared(whole)
        if truth is None:
            truth = output if case.truth is None else case.truth()
        errors[variant.label] = relative_error(output, truth)
        del whole
    del truth
    reference = case.variants[0]
    if reference.label not in timed:
        return
    if rivals:
        timed.update(_rivals(case, report))
    measured = dict(zip(timed, measure(list(timed.values()), repeats), strict=True))
    first = measured[reference.label]
    for label, time_ in measured.items():
        variant = next((v for v in case.variants if v.label == label), None)
        factors = {f"{kind}_factor": report["rates"]["factor"] for kind in (variant.quantized if variant else ())}
        bound = least_seconds(case.work, report["rates"], variant.quantized if variant else ())
        choice = variant.choice if variant else None
        row = {
            "name": f"{case.kind}/{label}",
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
            "relative_error": errors.get(label),
            "reference_relative_error": errors[reference.label],
            "compared_with": f"{reference.label} output" if case.truth is None else "float32",
            "tera_ops": case.work.total / 1e12,
            "least_bytes": least.get(label),
            # Of the rates measured in this run: 1 would be products at the peak and nothing else.
            "fraction_of_peak": None if variant is None else bound / (1e-3 * time_.median_ms),
            "implementation": choice and choice.implementation,
            "reason": choice and choice.reason,
            "rival": variant is None,
            "weight_bytes": variant.weight_bytes if variant else 0,
            "reference_weight_bytes": reference.weight_bytes,
            "rounds": time_.rounds,
            "compile_seconds": timed[label].compile_seconds,
            "scaled": None,
        }
        if variant is reference:
            report.setdefault("references", []).append(row)
        else:
            report["results"].append(row)


def _rivals(case: Case, report: dict) -> dict:
    """Compiled ones by their labels; those that are not installed or fail are listed with the reason."""
    ready = {}
    for rival in case.rivals:
        if rival.missing:
            reason = f"not installed: {', '.join(rival.missing)}"
            report["left_out"].append(
                {"name": f"{case.kind}/{rival.label}", "shape": case.shape.name, "reason": reason}
            )
            continue
        try:
            function, arguments = rival.make()
            ready[rival.label] = (TorchTimed if rival.is_torch else Timed)(function, *arguments)
        except RIVAL_ERRORS as error:
            _failed(report, case.kind, case.shape.name, rival.label, error)
    return ready


def _failed(report: dict, kind: str, shape_name: str, label: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:300]}"
    report["failed"].append({"name": f"{kind}/{label}", "shape": shape_name, "reason": reason})


@jax.jit
def _relative_error(output, truth):
    output, truth = (a.astype(jnp.float32) for a in (output, truth))
    return jnp.sqrt(((output - truth) ** 2).sum() / (truth**2).sum())


def relative_error(output: jax.Array, truth: jax.Array) -> float:
    """||output - truth|| / ||truth||, in float32."""
    return float(_relative_error(output, truth))
