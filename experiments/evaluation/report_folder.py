"""Where a report may be written."""

import os
from pathlib import Path

from qvdjax.errors import UserError

METRICS = "metrics.json"
REPORT = "report.html"
VIDEOS = "videos"


def check_target(target: Path) -> None:
    """Say early, before hours of sampling, that a report could not be written to `target`.

    A report that is there already may be replaced; nothing else may.

    Raises:
        UserError: It is a file, a folder of something else, or in a place one cannot write to.
    """
    if target.is_dir():
        if any(target.iterdir()) and not (target / REPORT).is_file():
            raise UserError(f"{target} holds something other than a report", remedy="name a new or empty folder")
    elif target.exists() or target.is_symlink():
        raise UserError(f"{target} is a file", remedy="name a new folder")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"{parent} cannot be written to", remedy="name a folder in a place you may write to")
