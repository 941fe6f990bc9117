"""Where results of comparisons are kept: one JSON file a row and seed."""

import json
from pathlib import Path
from typing import Any, Final

from qvdjax.errors import UserError

RESULTS: Final = Path(__file__).resolve().parents[2] / "docs" / "results"


def file_of(folder: Path, name: str, seed: int) -> Path:
    """Where a row's result with a seed is kept."""
    slug = "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
    return folder / f"{slug}-{seed}.json"


def load(folder: Path, rows: list[str], command: str) -> dict[str, list[dict[str, Any]]]:
    """Results by row, in the order of `rows`, seeds ascending; without rows that have none.

    Raises:
        UserError: There are none, or they are of different protocols; `command` makes them.
    """
    found: dict[str, list[dict]] = {name: [] for name in rows}
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    if not results:
        raise UserError(f"{folder} holds no results", remedy=f"run {command}")
    if any(one["protocol"] != results[0]["protocol"] for one in results):
        raise UserError(f"{folder} holds results of different protocols", remedy="compare them in folders of their own")
    for one in sorted(results, key=lambda one: one["seed"]):
        found[one["row"]].append(one)
    return {name: many for name, many in found.items() if many}


def missing(results: dict[str, list[dict]], rows: list[str]) -> list[str]:
    """Lines of Markdown about rows that were not run, and those with fewer seeds than others."""
    most = max(len(many) for many in results.values())
    short = [f"{name} ({len(results.get(name, ()))} of {most})" for name in rows if len(results.get(name, ())) < most]
    return [f"Seeds that are still to be run: {', '.join(short)}.", ""] if short else []
