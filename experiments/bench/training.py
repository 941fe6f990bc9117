"""`python -m experiments.bench.training`: time one step of training, with Phi and without it, on this device.

The step is the one of `qvdjax train --dtype bfloat16 --remat`: float32 master weights, moments and average, a frozen
teacher in bfloat16, blocks computed again in the backward pass. Weights and data are random. Wan 2.1 1.3B at 480p,
one video, on a GPU of 80 GiB and more:

    python -m experiments.bench.training --output docs/benchmarks/training/NAME.json
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import models
from experiments.bench.ceilings import step_work, training_work
from experiments.bench.peaks import machine
from experiments.bench.shapes import CONFIGS, LATENT_SIZES, Shape
from experiments.training.planned import STEPS, published_trainer
from experiments.training.precision import computing_in
from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError
from qvdjax.parallel import bytes_held
from qvdjax.recipes import Recipe, get

WITHOUT = {"rank": 0}  # the same training with no Phi


def run_training_bench(
    model: str = "wan2.1-t2v-1.3b", recipe: str = "qvgen-w4a4", *, size: str | None = None, batch: int = 1,
    accumulate: int = 1, repeats: int = 7,
) -> dict:  # fmt: skip
    """Time steps of the recipe and of the same without Phi in turns, each from its own state.

    Args:
        model: One of `CONFIGS`.
        recipe: That has the option `rank`.
        size: One of the family's `LATENT_SIZES`; None for its usual one.
        batch: Videos in a step.
        accumulate: Micro-batches the batch is cut into.
        repeats: Steps of each that are timed, after one that is not.

    Returns:
        `results`: {"with Phi", "without Phi"} -> {median_ms, spread_ms, bytes (arguments + temporaries + outputs -
        aliased, as the compiler counts), loss (of each step), model_flops_per_second, compile_seconds}; `ratios` of
        the two, {time, bytes}; the machine, versions and settings.

    Raises:
        UserError: Unknown names, a recipe without Phi, or fewer than one repeat.
    """
    if model not in CONFIGS:
        raise UserError(f"no model is called {model!r}", remedy=f"choose from {', '.join(CONFIGS)}")
    if repeats < 1:
        raise UserError(f"{repeats} repeats", remedy="give at least 1")
    config, sizes = CONFIGS[model], LATENT_SIZES[models.family_of(CONFIGS[model]).name]
    size = next(iter(sizes)) if size is None else size
    if size not in sizes:
        raise UserError(f"unknown size {size!r}", remedy=f"choose from {', '.join(sizes)}")
    variants = {"with Phi": get(recipe), "without Phi": get(recipe, **WITHOUT)}
    parsed = models.parse_config(config)
    shapes = {
        "latents": (batch, *sizes[size], parsed.in_channels), "context": (batch, parsed.text_tokens, parsed.text_dim)
    }  # fmt: skip
    data = {
        name: jax.random.normal(jax.random.key(number), shape, jnp.float32)
        for number, (name, shape) in enumerate(shapes.items())
    }
    weights = jax.jit(lambda: models.build(config, key=jax.random.key(2), dtype=jnp.float32))()
    # Ends at zero as its authors initialise it; a student of zero would have nothing to learn from a teacher of zero.
    end = weights.proj_out.weight
    end[...] = 0.02 * jax.random.normal(jax.random.key(3), end.shape, end.dtype)
    teacher = computing_in(weights, "bfloat16")
    runs = {name: _Run(weights, one, teacher, data, accumulate=accumulate) for name, one in variants.items()}
    del weights
    for turn in range(repeats + 1):
        # Another one begins each time: what drifts meets both alike.
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            runs[name].step(timed=turn > 0)
    shape = Shape(model, config, shapes["latents"][1:], shapes["context"][1])
    flops = training_work(step_work(shape) * batch, teacher=True).total
    results = {name: run.report(flops) for name, run in runs.items()}
    first, second = (results[name] for name in variants)
    return {
        "model": model, "recipe": recipe, "size": size, "batch": batch, "accumulate": accumulate,
        "repeats": repeats, **machine(), "model_flops": flops, "results": results,
        "ratios": {"time": first["median_ms"] / second["median_ms"], "bytes": first["bytes"] / second["bytes"]},
    }  # fmt: skip


class _Run:
    """A training under way, compiled ahead of its first step."""

    def __init__(self, weights, recipe: Recipe, teacher, data: dict[str, jax.Array], *, accumulate: int):
        batch = data["latents"].shape[0]
        trainer = published_trainer(weights, recipe, batch, accumulate=accumulate)
        self.state = trainer.start(STEPS)
        self.constant = (data, trainer.rest, teacher)
        begin = time.perf_counter()
        self.compiled = trainer.run_on.lower(self.state, *self.constant).compile()
        self.compile_seconds = time.perf_counter() - begin
        self.milliseconds: list[float] = []
        self.losses: list[float] = []

    def step(self, *, timed: bool) -> None:
        """One step, waited for."""
        begin = time.perf_counter()
        self.state, metrics = jax.block_until_ready(self.compiled(self.state, *self.constant))
        if timed:
            self.milliseconds.append(1000 * (time.perf_counter() - begin))
        self.losses.append(float(metrics["loss"]))

    def report(self, flops: float) -> dict[str, Any]:
        """Of all steps that were timed."""
        median, spread = statistics.median(self.milliseconds), max(self.milliseconds) - min(self.milliseconds)
        return {
            "median_ms": median, "spread_ms": spread, "bytes": bytes_held(self.compiled), "loss": self.losses,
            "model_flops_per_second": 1000 * flops / median, "compile_seconds": self.compile_seconds,
        }  # fmt: skip


def section(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of the benchmarks' page, from reports by the name of their file."""
    lines = [
        "## Training steps", "",
        "`python -m experiments.bench.training`: steps of the same training with Phi and without it, in turns, on",
        "random weights and data. **memory** is arguments + temporaries + outputs, less what is shared, as the",
        "compiler counts; **TFLOP/s** are model FLOPs: what is computed again in the backward pass does not count.", "",
    ]  # fmt: skip
    if not reports:
        return [*lines, "Pending: a step of Wan 2.1 1.3B at 480p on a GPU, the command's default, was not run yet.", ""]
    lines += [
        "| file | device | model | recipe | videos | with Phi ms | without ms | time | memory GiB | memory | TFLOP/s |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, report in reports.items():
        own, without = (report["results"][f"{which} Phi"] for which in ("with", "without"))
        cells = (
            name, f"{report['device']}, jax {report['versions']['jax']}", f"{report['model']} {report['size']}",
            report["recipe"], str(report["batch"]), f"{own['median_ms']:.4g} (± {own['spread_ms'] / 2:.2g})",
            f"{without['median_ms']:.4g} (± {without['spread_ms'] / 2:.2g})", f"**{report['ratios']['time']:.3f}**",
            f"{own['bytes'] / 2**30:.3g}", f"**{report['ratios']['bytes']:.3f}**",
            f"{own['model_flops_per_second'] / 1e12:.3g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; exit code 2 for bad arguments."""
    parser = argparse.ArgumentParser(
        prog="experiments.bench.training", description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--model", default="wan2.1-t2v-1.3b", help=f"one of {', '.join(CONFIGS)}")
    add("--recipe", default="qvgen-w4a4", help="trained with Phi and without")
    add("--size", help="of the video; by default the family's usual one")
    add("--batch", type=int, default=1, help="videos in a step")
    add("--accumulate", type=int, default=1, help="micro-batches the batch is cut into")
    add("--repeats", type=int, default=7, help="timed steps of each")
    add("--output", type=Path, metavar="FILE.json", help="where the report goes; by default only to stdout")
    options = vars(parser.parse_args(arguments))
    output = options.pop("output")
    try:
        report = run_training_bench(**options)
        text = json.dumps(report, indent=1) + "\n"
        if output is not None:
            with new_file(output) as temporary:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.write_text(text, encoding="utf-8")
    except UserError as error:
        print(f"experiments.bench.training: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
