"""What training says while it runs: one JSON object a line, and curves for TensorBoard."""

import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qvdjax.errors import UserError


class Log:
    """JSON lines in a file, if one is given, and on stdout, if asked for.

    Lines about steps, those with a `step`, are curves for TensorBoard too, if a folder is given: each number by the
    path of its name.

    Raises `OSError` at once where the file cannot be written, and `UserError` where TensorBoard's writer is missing.
    """

    def __init__(self, file: Path | None = None, *, echo: bool = False, tensorboard: Path | None = None):
        self.file, self.echo, self.start = file, echo, time.perf_counter()
        self.curves = None if tensorboard is None else _writer(tensorboard)
        if file:
            file.open("a").close()

    @property
    def seconds(self) -> float:
        """Since the log was opened."""
        return time.perf_counter() - self.start

    def __call__(self, **fields: Any) -> None:
        """Write one line."""
        line = json.dumps({**fields, "seconds": round(self.seconds, 1)})
        if self.echo:
            print(line, flush=True)
        if self.file:
            with self.file.open("a") as out:
                out.write(line + "\n")
        if self.curves and "step" in fields:
            values = {key: value for key, value in fields.items() if key != "step"}
            for path, number in _numbers(values, str(fields.get("event", ""))):
                self.curves.add_scalar(path, number, fields["step"])
            self.curves.flush()


def _writer(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        remedy = "install it: pip install 'qvdjax[tensorboard]'"
        raise UserError("writing curves for TensorBoard needs tensorboardX", remedy=remedy) from error
    return SummaryWriter(str(folder))


def _numbers(fields: Mapping[str, Any], above: str) -> Iterator[tuple[str, float]]:
    """Every number in fields and in mappings inside them, with its path."""
    for name, value in fields.items():
        path = f"{above}/{name}" if above else name
        if isinstance(value, Mapping):
            yield from _numbers(value, path)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield path, value
