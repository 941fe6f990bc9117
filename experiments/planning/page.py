"""`python -m experiments.planning.page`: compile the plans of docs/plans that are not there, and write its page.

What is there already is kept; `--again NAME` compiles one anew, `--only-page` none.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.planning import overhead, vae
from experiments.planning.overhead import FOLDER

_TRAIN = {"recipe": "qvgen-w4a4", "step": "train"}
_WAN, _SMALL_WAN, _COGVIDEOX, _SMALL_COGVIDEOX = "wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "cogvideox-5b", "cogvideox-2b"
# Name -> arguments of `experiments.planning.plan`.
PLANS = {
    # The slices that QVGen's training of the largest model is asked to fit.
    "wan-14b-train-v5e-256": {"model": _WAN, "topology": "v5e:16x16", "batch": 64, "accumulate": 2, **_TRAIN},
    "wan-14b-train-v5p-64": {"model": _WAN, "topology": "v5p:4x4x4", "batch": 64, "accumulate": 4, **_TRAIN},
    "wan-14b-train-v6e-64": {"model": _WAN, "topology": "v6e:8x8", "batch": 64, "accumulate": 8, **_TRAIN},
    "wan-1.3b-train-v5e-64": {"model": _SMALL_WAN, "topology": "v5e:8x8", "batch": 32, "accumulate": 2, **_TRAIN},
    "wan-1.3b-train-v5p-8": {"model": _SMALL_WAN, "topology": "v5p:2x2x2", "batch": 8, "accumulate": 4, **_TRAIN},
    "wan-1.3b-train-v6e-16": {"model": _SMALL_WAN, "topology": "v6e:4x4", "batch": 16, "accumulate": 4, **_TRAIN},
    "cogvideox-5b-train-v5e-64": {"model": _COGVIDEOX, "topology": "v5e:8x8", "batch": 16, "accumulate": 4, **_TRAIN},
    "cogvideox-5b-train-v5p-16": {"model": _COGVIDEOX, "topology": "v5p:2x2x4", "batch": 16, **_TRAIN},
    "cogvideox-5b-train-v6e-16": {"model": _COGVIDEOX, "topology": "v6e:4x4", "batch": 16, "accumulate": 4, **_TRAIN},
    "cogvideox-2b-train-v5e-64": {"model": _SMALL_COGVIDEOX, "topology": "v5e:8x8", "batch": 32, **_TRAIN},
    "cogvideox-2b-train-v5p-8": {"model": _SMALL_COGVIDEOX, "topology": "v5p:2x2x2", "batch": 8, **_TRAIN},
    "cogvideox-2b-train-v6e-16": {"model": _SMALL_COGVIDEOX, "topology": "v6e:4x4", "batch": 16, **_TRAIN},
    **{
        f"{name}-sample-{place.replace(':', '-')}": {"model": model, "topology": place, "recipe": "rtn-w4a8"}
        for name, model in (
            ("wan-14b", _WAN), ("wan-1.3b", _SMALL_WAN), ("cogvideox-5b", _COGVIDEOX),
            ("cogvideox-2b", _SMALL_COGVIDEOX),
        )
        for place in ("v5e:2x4", "v5p:2x2x1", "v6e:2x2")
    },
    **{
        f"{name}-reconstruct-{place.replace(':', '-')}": {
            "model": model, "topology": place, "recipe": "s2q-vdit-w4a6", "step": "reconstruct",
        }
        for name, model, place in (
            ("wan-14b", _WAN, "v5e:2x4"), ("wan-1.3b", _SMALL_WAN, "v5e:2x2"),
        )
    },
    "animatediff-sample-v5e-2x2": {
        "model": "animatediff", "topology": "v5e:2x2", "recipe": "qvd-w8a8", "batch": 4, "effort": -1.0,
    },
}  # fmt: skip
COLUMNS = (
    "model", "recipe", "slice", "mesh", "videos", "a chip", "fits", "gathered", "other collectives", "bound",
    "compiled in",
)  # fmt: skip

INTRODUCTION = """\
# Plans

Made by `python -m experiments.planning.page` from the JSON files in this folder; do not edit it. Each is one step that
was compiled for a TPU slice by the TPU compiler itself, on a machine without a TPU ([how](../plan.md)). None was run.

- **a chip** is arguments + temporaries + outputs, less what is shared, of what a program may use on one chip.
- **gathered** is what a chip receives in all-gathers, by type: weights that travel as s8 or s4 are codes; those of a
  training step are rounded after they were gathered and travel wide.
- Exchanged bytes are read off the compiled program: a loop whose turns the compiler does not state counts once, and an
  exchange that it has cut into a loop counts as often as that turns. Between slices they are no measure of time.
- **bound** is arithmetic, not a measurement: model FLOPs at the published peak of all chips, or the bytes a chip holds
  at its memory's rate, whichever is longer. Real steps take longer; how much is for a slice to say.
- AnimateDiff's UNet is compiled with the compiler's least effort: its convolutions take more than twenty minutes
  otherwise, for a program that may need less memory and time.
- **compiled in** is wall clock on two cores, in brackets the time that all cores spent on it: where the first is much
  longer, the machine had other work.
- Reconstruction is one step of one block of `qvdjax quantize`, on one model input, with the float model beside it; a
  block takes as many steps as a recipe has examples, times its epochs (`s2q-vdit`: 1200).
- Sampling is one forward pass of one video (guidance takes two). Training is `qvdjax train --dtype bfloat16 --remat`
  with its teacher; the start of a phase of rank decay, which comes a few times in a run, is counted in every step.
"""


def compile_missing(folder: Path, again: Sequence[str] = ()) -> None:
    """Write NAME.json for every plan that has none, and for those named."""
    # The slice is described by libtpu; jax itself runs on this machine's CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from experiments.planning import plan

    folder.mkdir(parents=True, exist_ok=True)
    for name, arguments in PLANS.items():
        path = folder / f"{name}.json"
        if path.exists() and name not in again:
            continue
        report = plan(**arguments)
        versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
        path.write_text(json.dumps({**report, "versions": versions}, indent=1) + "\n")
        answer = "fits" if report["fits"] else report["reason"]
        print(f"{name}: {answer}; compiled in {report['compile_seconds']:.0f} s", flush=True)


def page(reports: dict[str, dict], phi: dict | None = None, decoding: dict | None = None) -> str:
    """The page as Markdown; `phi` is what `overhead.count` found, `decoding` what `vae.compare` did."""
    versions = sorted({f"jax {r['versions']['jax']}, libtpu {r['versions']['libtpu']}" for r in reports.values()})
    lines = [INTRODUCTION, f"Compiled with {'; '.join(versions)}.", ""]
    titles = {"train": "Training steps", "sample": "Sampling steps", "reconstruct": "Steps of block reconstruction"}
    for step, title in titles.items():
        lines += [
            f"## {title}", "", f"| {' | '.join(COLUMNS)} |", f"| {' | '.join('---' for _ in COLUMNS)} |",
            *(_row(report) for report in reports.values() if report["step"] == step), "",
        ]  # fmt: skip
    return "\n".join([*lines, *(overhead.section(phi) if phi else ()), *(vae.section(decoding) if decoding else ())])


def _row(report: dict) -> str:
    mesh = ", ".join(f"{name} {size}" for name, size in report["mesh"].items() if size > 1) or "one chip"
    videos = f"{report['batch']}" + (f" in {report['accumulate']}" if report["accumulate"] > 1 else "")
    gathered = [row for row in report["collectives"] if row["kind"] == "all-gather"]
    others: dict[str, int] = {}
    for row in report["collectives"]:
        if row not in gathered:
            others[row["kind"]] = others.get(row["kind"], 0) + row["bytes"]
    held = "?" if report["bytes_per_chip"] is None else f"{report['bytes_per_chip'] / 2**30:.2f}"
    bound = "?" if report["bound_seconds"] is None else f"{report['bound_seconds']:.3g} s ({report['bound_by']})"
    cells = (
        report["model"], report["recipe"], report["topology"], mesh, videos,
        f"{held} of {report['chip_bytes'] / 2**30:.2f} GiB", "yes" if report["fits"] else "**no**",
        ", ".join(f"{row['dtype']} {_size(row['bytes'])}" for row in gathered if row["bytes"] >= 2**20) or "none",
        ", ".join(f"{kind} {_size(size)}" for kind, size in others.items() if size >= 2**20) or "none",
        bound, _compiling(report),
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _compiling(report: dict) -> str:
    """Wall clock, and the time of all cores where a plan has it."""
    processor = report.get("compile_processor_seconds")
    return f"{report['compile_seconds']:.0f} s" + ("" if processor is None else f" ({processor:.0f} s)")


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def write(folder: Path) -> Path:
    """Write the page from the files of the folder, in the order of `PLANS`."""
    found = {name: folder / f"{name}.json" for name in PLANS}
    reports = {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}
    others = (folder / overhead.FILE, folder / vae.FILE)
    found = [json.loads(path.read_text()) if path.exists() else None for path in others]
    (folder / "README.md").write_text(page(reports, *found))
    return folder / "README.md"


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="experiments.planning.page", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    parser.add_argument("--again", action="append", default=[], choices=PLANS, metavar="NAME", help="compile anew")
    parser.add_argument("--only-page", action="store_true", help="compile nothing")
    options = parser.parse_args(arguments)
    if not options.only_page:
        compile_missing(options.folder, options.again)
    print(write(options.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
