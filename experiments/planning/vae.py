"""`python -m experiments.planning.vae`: the memory in which Wan's VAE decodes, a frame at a time and in one pass.

Both forms of `AutoencoderKLWan.decode` are compiled for one chip of a TPU slice, with the published configuration in
float32. That takes some ten minutes of one core, and with `--effort -1` one, for other numbers. Nothing is run.
"""

import argparse
import importlib.metadata
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.planning.overhead import FOLDER

FILE = "wan-vae-decode.json"
TOPOLOGY = "v5p:1x1x1"
SIZE = (81, 480, 832)  # frames, height, width of the video


def compare(size: tuple[int, int, int] = SIZE, topology: str = TOPOLOGY, effort: float | None = None) -> dict:
    """Compile decoding of one video in both forms.

    Args:
        size: Frames, height and width of the video.
        topology: The slice; one of its chips is compiled for.
        effort: The compiler's, see `qvdjax.parallel.plan`.

    Returns:
        `scan` and `single_pass`, each what `qvdjax.parallel.plan` says about `fits`, `reason`, `bytes_per_chip`,
        `temporary_bytes` and `compile_seconds`; `ratio` of their bytes a chip; and what was compiled.
    """
    import jax
    import jax.numpy as jnp

    from models.vae_folders import build_vae
    from qvdjax import parallel

    mesh = parallel.topology_mesh(topology)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    describe = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=whole)  # noqa: E731
    vae = jax.eval_shape(lambda: build_vae({"_class_name": "AutoencoderKLWan"}))
    time, rows, columns = vae.config.compression
    shape = (1, (size[0] - 1) // time + 1, size[1] // rows, size[2] // columns, vae.config.latent_channels)
    arguments = jax.tree.map(describe, (vae, jax.ShapeDtypeStruct(shape, jnp.float32)))
    reports = {}
    for name, scan in (("scan", True), ("single_pass", False)):
        report = parallel.plan(
            lambda vae, latents, scan=scan: vae.decode(latents, scan=scan), *arguments, mesh=mesh, effort=effort
        )
        kept = ("fits", "reason", "bytes_per_chip", "temporary_bytes", "compile_seconds")
        reports[name] = {key: report[key] for key in kept}
        print(f"{name}: {reports[name]}", file=sys.stderr, flush=True)
    versions = {package: importlib.metadata.version(package) for package in ("jax", "libtpu")}
    return {
        **reports, "ratio": reports["scan"]["bytes_per_chip"] / reports["single_pass"]["bytes_per_chip"],
        "vae": "AutoencoderKLWan, float32", "size": [*size], "topology": topology, "effort": effort,
        "versions": versions,
    }  # fmt: skip


def section(report: dict) -> list[str]:
    """The lines of docs/plans about it."""
    frames, height, width = report["size"]
    effort = "" if report["effort"] is None else f" with the compiler's effort at {report['effort']:g}"
    rows = [("a latent frame at a time", report["scan"]), ("in one pass", report["single_pass"])]
    return [
        "## Decoding by Wan's VAE", "",
        f"`python -m experiments.planning.vae`: {report['vae']}, {frames} frames of {height} x {width} on one chip of",
        f"{report['topology']}. Compiled{effort}, not run.", "",
        "| decoding | a chip | of it temporary | compiled in |", "| --- | ---: | ---: | ---: |",
        *(
            f"| {title} | {one['bytes_per_chip'] / 2**30:.2f} GiB | {one['temporary_bytes'] / 2**30:.2f} GiB "
            f"| {one['compile_seconds']:.0f} s |"
            for title, one in rows
        ), "", f"The first needs {report['ratio']:.1%} of the second.", "",
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="experiments.planning.vae", description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER, help="(default: %(default)s)")
    parser.add_argument("--topology", default=TOPOLOGY, help="(default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=3, default=SIZE, help="frames, height, width (default: %(default)s)")
    parser.add_argument("--effort", type=float, help="of the compiler, -1 to 1 (default: its usual one)")
    options = parser.parse_args(arguments)
    # The slice is described by libtpu; jax itself runs on this machine's CPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    report = compare(tuple(options.size), options.topology, options.effort)
    (options.folder / FILE).write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report["ratio"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
