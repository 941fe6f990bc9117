"""What a verb hands back: one report for programs, a few tables and lines for people, and the exit code."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OK, MISSED, USER_ERROR, INTERNAL_ERROR, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 70, 130, 141


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows to draw; `right` names the columns that are numbers and line up on the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    title: str = ""
    right: frozenset[str] = frozenset()


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The answer of one verb.

    Args:
        report: What `--json` prints: JSON types, numpy scalars, arrays and paths.
        lines: What people read, in order: plain strings and `Table`s.
        missed: Thresholds that were not met, one line each; any makes the exit code 1.
    """

    report: Mapping[str, Any]
    lines: Sequence[str | Table] = ()
    missed: Sequence[str] = ()

    @property
    def exit_code(self) -> int:
        """0, or 1 when a threshold was missed."""
        return MISSED if self.missed else OK


def to_json(value: Any) -> str:
    """One JSON object on one line. JSON has no infinity and no NaN: both become null."""
    return json.dumps(_plain(value), allow_nan=False)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value):
        return _plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if hasattr(value, "tolist"):  # numpy and jax scalars and arrays
        return _plain(value.tolist())
    if isinstance(value, (Sequence, set, frozenset)):
        return [_plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form")


def number(value: float | int | None, digits: int = 4) -> str:
    """A number for a table: `digits` significant digits; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def size(count: float) -> str:
    """A count of bytes in the largest binary unit that keeps it above 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
