"""`python -m experiments.bench.estimates`: cycles that the TPU compiler expects of a quantized block, and bytes.

The feed-forward of Wan 2.1 14B on the 32,760 tokens of a video at 480p, with the norm, modulation, gate and residual
around it, and the whole block, whose attention is quantized too, are compiled for one chip of each generation in
bfloat16 and quantized. Nothing is run: cycles are the compiler's model of a chip, no timing, and compare within a
generation only. Kernels are opaque to it: of the block's attention it counts what XLA does around the kernels.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "benchmarks" / "estimates"
FILE = "wan-14b.json"
INTEGERS = ("rtn-w8a8", "rtn-w4a8")
# Slices of one chip, and what is the fast type there.
COMPILED = {"v5e:1x1": INTEGERS, "v5p:1x1x1": INTEGERS, "v6e:1x1": INTEGERS, "tpu7x:1x1x1": ("fp8-w8a8",)}
RECIPES = tuple(dict.fromkeys(recipe for recipes in COMPILED.values() for recipe in recipes))
SHAPE = "wan2.1-14b-480p"
TOKENS, WIDTH, HIDDEN = 32760, 5120, 13824
PROGRAMS = ("first layer", "feed-forward", "block")


def estimate(topology: str, recipe: str | None, program: str) -> dict:
    """Compile one program.

    Args:
        topology: One chip; of two devices (tpu7x) the first is compiled for.
        recipe: What quantizes all layers; None for bfloat16.
        program: "first layer": norm, modulation, and what they feed. "feed-forward": all of it, to the residual.
            "block": with both attentions, whose products are quantized too where layers are.

    Returns:
        `cycles`, None where the compiler says none; `temporary_bytes`; `integers`: bytes of int32 arrays as large as an
        activation that are written to memory.
    """
    from experiments.bench.block_program import compiled_block
    from qvdjax.parallel import Program

    if program == "block":
        attention = {} if recipe is None else {"attention_qk_bits": 8, "attention_pv_bits": 8}
        compiled = compiled_block(SHAPE, recipe, topology, {"context": 1}, **attention)
    else:
        compiled = _compiled_feed_forward(topology, recipe, whole=program == "feed-forward")
    read = Program(compiled.as_text())
    return {
        "cycles": read.estimated_cycles(), "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "integers": sum(row["bytes"] * row["count"] for row in read.written("s32", TOKENS * WIDTH)),
    }  # fmt: skip


def _compiled_feed_forward(topology: str, recipe: str | None, *, whole: bool):
    """Norm, modulation and the first layer; with `whole` the second, gate and residual too."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from experiments.bench.cases import scheme_of
    from models.blocks import FeedForward, modulate
    from qvdjax.nn import LayerNorm, at_least_float32
    from qvdjax.parallel import abstract, topology_mesh
    from qvdjax.ptq.layers import quantize_layer
    from qvdjax.recipes import get

    def build():
        module = FeedForward(WIDTH, HIDDEN, key=jax.random.key(0), dtype=jnp.bfloat16)
        if recipe is not None:
            scheme = scheme_of(get(recipe))
            module.net["0"]["proj"] = quantize_layer(module.net["0"]["proj"], scheme, execution="integer")
            module.net["2"] = quantize_layer(module.net["2"], scheme, execution="integer")
        return module

    norm = LayerNorm(WIDTH, epsilon=1e-6, affine=False)

    def run(module, x, table):
        shift, scale, gate = (table[:, i] for i in range(3))
        normalised = modulate(norm(x), scale, shift, x.dtype)
        if not whole:
            return module.net["0"]["proj"](normalised)
        return (at_least_float32(x) + module(normalised) * gate).astype(x.dtype)

    mesh = topology_mesh(topology, {"context": 1})
    one = NamedSharding(mesh, PartitionSpec())
    with jax.set_mesh(mesh):
        return jax.jit(run).lower(
            abstract(jax.eval_shape(build), mesh),
            jax.ShapeDtypeStruct((1, TOKENS, WIDTH), jnp.bfloat16, sharding=one),
            jax.ShapeDtypeStruct((1, 3, 1, WIDTH), jnp.float32, sharding=one),
        ).compile()  # fmt: skip


def count(compiled: Mapping[str, Sequence[str]] = COMPILED) -> dict:
    """All programs, full precision and quantized, and the versions that compiled them."""
    results = []
    for topology, recipes in compiled.items():
        for program in PROGRAMS:
            for recipe in (None, *recipes):
                row = {"topology": topology, "program": program, "recipe": recipe or "bfloat16"}
                results.append({**row, **estimate(topology, recipe, program)})
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {"tokens": TOKENS, "width": WIDTH, "hidden": HIDDEN, "versions": versions, "results": results}


def section(report: Mapping | None) -> list[str]:
    """Lines of the benchmarks' page."""
    if report is None:
        return []
    cycles = {(r["topology"], r["program"], r["recipe"]): r["cycles"] for r in report["results"]}
    lines = [
        "## Cycles that the TPU compiler expects", "",
        f"`python -m experiments.bench.estimates` (jax {report['versions']['jax']}, libtpu"
        f" {report['versions']['libtpu']}): a block of Wan 2.1 14B on {report['tokens']:,} tokens, compiled for",
        "one chip and not run. Millions of cycles in the compiler's model of the chip: **estimates, no timings**, to",
        "be compared within a row. *First layer* is norm, modulation, rounding and the product; *feed-forward* goes on",
        "through GELU, the second layer, gate and residual. *Block* is all of it, the products of its attention",
        "quantized too; attention kernels, which the compiler does not know, are not counted, what is around them is.",
        "",
        "| slice | program | bfloat16 | " + " | ".join(f"{r} | ratio" for r in RECIPES) + " | int32 in memory |",
        "| --- | --- | ---: | " + " | ".join("---: | ---:" for _ in RECIPES) + " | ---: |",
    ]  # fmt: skip
    for topology in dict.fromkeys(r["topology"] for r in report["results"]):
        for program in PROGRAMS:
            reference = cycles[topology, program, "bfloat16"]
            cells = [topology, program, f"{reference / 1e6:.1f}"]
            for recipe in RECIPES:
                own = cycles.get((topology, program, recipe))
                cells += ["", ""] if own is None else [f"{own / 1e6:.1f}", f"**{own / reference:.2f}**"]
            integers = sum(
                r["integers"] for r in report["results"] if (r["topology"], r["program"]) == (topology, program)
            )
            lines.append(f"| {' | '.join([*cells, f'{integers} B'])} |")
    return [*lines, ""]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="experiments.bench.estimates", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    # The chip is described by libtpu; jax itself runs on this machine's CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    report = count()
    options.folder.mkdir(parents=True, exist_ok=True)
    (options.folder / FILE).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
