"""`python -m experiments.planning.overhead`: what Phi adds to a step of training, counted by the TPU compiler.

The same step of Wan 2.1 1.3B is compiled with Phi and without it, in the shapes of 81 frames at 480p. Nothing is run.
Because the compiler counts the body of a loop once, operations and bytes are those of a model of one block and one
micro-batch; a step of the whole model is thirty times the block and the same embedders. Memory is that of the whole
model. Phi is kept (`phases=keep`) where operations are counted: the start of a phase comes a few times in a run, and
the compiler would count it in every step. Memory is counted with its decay.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "plans"
FILE = "phi-overhead.json"
RECIPE = "qvgen-w4a4"
# A video a chip, so that the products of the factors, whose cost does not depend on the tokens, weigh the most that
# they can; in plans with more videos a chip they weigh less.
BLOCK = {"topology": "v5p:2x2x2", "mesh": "fsdp=8", "batch": 8, "layers": 1}
WHOLE = {"topology": "v5p:2x2x2", "batch": 8, "accumulate": 4}
WITHOUT = {"rank": 0}


def count(model: str) -> dict:
    """Compile the four programs.

    Returns:
        `with_phi` and `without_phi`, each {flops, bytes, memory}: operations and memory traffic of one block's step on
        one chip, and bytes that the whole model's step needs on a chip; `ratios` of the two by the same names, and
        `time`: the larger of the ratios of flops and bytes, which is the most that Phi can add where the step is bound
        by either; and what was compiled.
    """
    from experiments.planning import plan

    def counted(block: dict, whole: dict) -> dict:
        one = plan(model, RECIPE, step="train", overrides=block, **BLOCK)
        every = plan(model, RECIPE, step="train", overrides=whole, **WHOLE)
        return {
            "flops": one["compiler_flops"], "bytes": one["compiler_bytes"], "memory": every["bytes_per_chip"],
        }  # fmt: skip

    with_phi, without = counted({"phases": "keep"}, {}), counted(WITHOUT, WITHOUT)
    ratios = {name: with_phi[name] / without[name] for name in with_phi}
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {
        "model": model, "recipe": RECIPE, "block": BLOCK, "whole": WHOLE, "with_phi": with_phi, "without_phi": without,
        "ratios": {**ratios, "time": max(ratios["flops"], ratios["bytes"])}, "versions": versions,
    }  # fmt: skip


def section(report: dict) -> list[str]:
    """Lines of the plans' page."""
    rows = [
        ("operations of one block's step", "flops", 1e12, "TFLOP"),
        ("memory traffic of one block's step", "bytes", 2**30, "GiB"),
        ("memory of the whole model's step", "memory", 2**30, "GiB"),
    ]
    block, whole = report["block"], report["whole"]
    return [
        "## What Phi adds to a step", "",
        f"`python -m experiments.planning.overhead`: {report['model']}, {report['recipe']} against the same with",
        f"`rank=0`, a chip's part on {block['topology']}. The block: {block['batch']} videos on {block['mesh']}, Phi",
        f"kept; the whole: {whole['batch']} videos in {whole['accumulate']}, with rank decay. Compiled, not run.", "",
        "| | with Phi | without | ratio |", "| --- | ---: | ---: | ---: |",
        *(
            f"| {title} | {report['with_phi'][key] / unit:.3g} {name} | {report['without_phi'][key] / unit:.3g} {name} "
            f"| {report['ratios'][key]:.3f} |"
            for title, key, unit, name in rows
        ), "",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="experiments.planning.overhead", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="(default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    # The slice is described by libtpu; jax itself runs on this machine's CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    report = count(options.model)
    (options.folder / FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratios"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
