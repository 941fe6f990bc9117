"""Verbs about one model folder: convert, info, tabulate, export."""

import math
from typing import Any

from experiments.cli.arguments import Convert, Export, Info, Tabulate
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress

COLUMNS = ("path", "role", "shape", "weights", "inputs", "bytes", "SQNR dB", "why")
NUMBERS = frozenset({"weights", "inputs", "bytes", "SQNR dB"})


def convert(arguments: Convert, progress: Progress | None) -> Outcome:
    """Read a checkpoint of any known layout and write a diffusers-shaped folder."""
    import conversion

    report = conversion.convert(
        arguments.source,
        arguments.target,
        component=arguments.component,
        motion_adapter=arguments.motion_adapter,
        dtype=arguments.dtype,
        dry_run=arguments.dry_run,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    if report["layout"] == "pipeline":
        return _pipeline(arguments, report)
    done = "can be converted" if arguments.dry_run else f"-> {arguments.target}"
    return Outcome(report, (f"{arguments.source} {done}", *_facts(report)))


def _pipeline(arguments: Convert, report: dict[str, Any]) -> Outcome:
    """What became of a pipeline's components, or what would."""
    rows = [
        (part["name"], part["class"], part["action"], part["tensors"] or "-", size(part["source_bytes"]),
         size(part["bytes"]), ", ".join(part["dtypes"]) or "-")
        for part in report["components"]
    ]  # fmt: skip
    columns = ("component", "class", "action", "tensors", "bytes", "becomes", "types")
    table = Table(columns, rows, right=frozenset({"tensors", "bytes", "becomes"}))
    whole = f"{size(report['source_bytes'])} -> {size(report['bytes'])}, {size(report['free_bytes'])} free on the disk"
    if not arguments.dry_run:
        return Outcome(report, (f"{arguments.source} -> {arguments.target}", table, whole))
    missed = list(report["problems"].values())
    if report["bytes"] > report["free_bytes"]:
        missed.append(f"the disk of {arguments.target} is too small; free some space or choose another")
    verdict = "cannot be converted yet" if missed else "can be converted"
    return Outcome(report, (f"{arguments.source} {verdict}", table, whole), missed=missed)


def export(arguments: Export, progress: Progress | None) -> Outcome:
    """Write a folder in another format."""
    import conversion

    report = conversion.export(
        arguments.dir,
        arguments.out,
        arguments.format,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    return Outcome(report, (f"{arguments.out}: {arguments.format} from {arguments.dir}", *_facts(report)))


def tabulate(arguments: Tabulate, progress: Progress | None) -> Outcome:
    """Replace layers that see the timestep alone by tables."""
    from experiments.tabulating import tabulate_folder

    report = tabulate_folder(
        arguments.dir,
        arguments.out,
        steps=arguments.steps,
        solver=arguments.solver,
        sigma_grid=arguments.sigma_grid,
        shift=arguments.shift,
        overwrite=arguments.overwrite,
        progress=progress,
    )
    held, replaced, whole = report["table_bytes"], report["replaced_bytes"], report["weight_bytes"]
    lines = [
        f"{arguments.out}: {report['tables']} layers are tables over {report['steps']} steps of {report['solver']}",
        f"these layers: {size(replaced)} -> {size(held)}",
        f"the model: {size(whole['before'])} -> {size(whole['after'])} ({whole['ratio']:.3f})",
    ]
    return Outcome(report, lines)


def info(arguments: Info, progress: Progress | None) -> Outcome:
    """List the layers of a folder; of its weights only the recorded signal-to-noise ratios are read."""
    import models
    import qvdjax
    from models.components import component_of
    from qvdjax.checkpoint import CheckpointFolder
    from qvdjax.checkpoint.variables import parameter_count
    from qvdjax.description import weight_bytes

    if component := component_of(arguments.dir):
        folder, model, family = component.folder, component.abstract, component.architecture
    else:
        folder = CheckpointFolder.open(arguments.dir)
        model = models.skeleton(folder)  # which also checks every tensor's name, shape and type
        family = models.family_of(model.config.to_dict()).name
    layers = qvdjax.describe(model)
    _add_recorded_ratios(layers, folder)
    parameters, size_of_weights = parameter_count(model), weight_bytes(model)
    report = {
        "family": family,
        "parameters": parameters,
        "weight_bytes": size_of_weights,
        "layers": layers,
    }
    rows = [
        (
            row["path"],
            row["role"],
            "x".join(map(str, row["shape"])),
            row["weight_bits"] or "-",
            row["activation_bits"] or "-",
            number(row["bytes"]),
            number(row["sqnr_db"]),
            _why(row),
        )
        for row in layers
    ]
    table = Table(COLUMNS, rows, right=NUMBERS)
    total = f"{report['family']}: {parameters:,} parameters, {size(size_of_weights)}, {len(layers)} layers"
    return Outcome(report, (table, total))


def _why(row: dict[str, Any]) -> str:
    """The reason of a row, what is computed beside the product, and for a table what it stands in for."""
    replaced, online = row.get("replaced_bytes"), row.get("online")
    if replaced is not None:
        return f"{row['reason']}, in the place of {replaced:,} bytes"
    if online is None:
        return row["reason"]
    block = online["rotation_block"]
    names = [f"rotation of {block} channels" if name == "rotation" else name for name in online["transforms"]]
    names += [] if online["center_bits"] is None else [f"mean of tokens at {online['center_bits']} bits"]
    names += [] if online["rank"] is None else [f"branch of rank {online['rank']}, {size(online['branch_bytes'])}"]
    if "estimate_rank" in online:
        gains = "no gains" if online["estimate_frames"] is None else f"gains of {online['estimate_frames']} frames"
        names.append(f"estimate of rank {online['estimate_rank']} with {gains}, {size(online['estimate_bytes'])}")
    return f"{row['reason']}; online {', '.join(names)}: {online['share']:.1%} of its multiply-adds"


def _add_recorded_ratios(layers: list[dict[str, Any]], folder) -> None:
    """Fill in `sqnr_db` from the tensors that quantizing left in the folder."""
    for row in layers:
        key = f"{row['path']}.weight_sqnr_db"
        if row["sqnr_db"] is None and key in folder.files:
            ratio = float(folder.read(key))
            row["sqnr_db"] = round(ratio, 2) if math.isfinite(ratio) else None


def _facts(report: dict[str, Any]) -> list[str]:
    # The plain entries of a report, one a line; lists and tables are for --json.
    return [
        f"  {key}: {size(value) if key.endswith('bytes') else value}"
        for key, value in report.items()
        if isinstance(value, (str, int, float))
    ]
