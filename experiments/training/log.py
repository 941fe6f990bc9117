"""What training says while it runs: one JSON object a line."""

import json
import time
from pathlib import Path
from typing import Any


class Log:
    """JSON lines in a file, if one is given, and on stdout, if asked for.

    Raises `OSError` at once where the file cannot be written.
    """

    def __init__(self, file: Path | None = None, *, echo: bool = False):
        self.file, self.echo, self.start = file, echo, time.perf_counter()
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
