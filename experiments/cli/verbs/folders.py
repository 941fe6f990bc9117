"""Verbs about one model folder: convert, info, export."""

import math

from experiments.cli.arguments import Convert, Export, Info
from experiments.cli.outcome import Outcome, Table, number, size
from experiments.cli.terminal import Progress

LAYER_COLUMNS = ("path", "role", "shape", "weights", "activations", "bytes", "SQNR dB", "why")


def convert(arguments: Convert, progress: Progress | None) -> Outcome:
    """Read a checkpoint of any known layout and write a diffusers-shaped folder."""
    import conversion

    report = conversion.convert(arguments.source, arguments.target, dtype=arguments.dtype, progress=progress)
    return Outcome(report, (f"{arguments.target}: converted from {arguments.source}", *_facts(report)))


def export(arguments: Export, progress: Progress | None) -> Outcome:
    """Write a folder in another format."""
    import conversion

    report = conversion.export(arguments.dir, arguments.out, format=arguments.format, progress=progress)
    return Outcome(report, (f"{arguments.out}: {arguments.format} from {arguments.dir}", *_facts(report)))


def info(arguments: Info, progress: Progress | None) -> Outcome:
    """List the layers of a folder; reads its config and its tensors' headers."""
    import models
    from qvdjax import describe

    model = models.skeleton(arguments.dir)
    layers = describe(model)
    ...


def _facts(report: dict) -> list[str]:
    # The plain entries of a report, one a line; lists and tables are for --json.
    return [
        f"  {key}: {size(value) if key.endswith('bytes') else value}"
        for key, value in report.items()
        if isinstance(value, (str, int, float)) or value is None
    ]
