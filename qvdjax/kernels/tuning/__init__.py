"""Settings of kernels as data: one JSON file a kind of device, read once.

A file holds `device_kinds` (as jax names them), `source` (where the numbers come from, in words) and, under the name of
an operation, a list of rows. A row is settings by name, and `at_most`: limits of sizes by name. The first row within
whose limits a size lies is taken, so rows with narrow limits come first and the last has none.
"""

import functools
import json
from importlib import resources
from typing import Any

from qvdjax.kernels.dispatch import Device


def settings(operation: str, device: Device, **sizes: int) -> dict[str, Any] | None:
    """Settings of an operation on a device for arrays of such sizes; None where no file has any."""
    for row in _tables().get(device.kind, {}).get(operation, ()):
        if all(sizes[name] <= limit for name, limit in row.get("at_most", {}).items()):
            return {name: value for name, value in row.items() if name != "at_most"}
    return None


def source(device: Device) -> str | None:
    """Where the settings for a device come from; None where it has none."""
    return _tables().get(device.kind, {}).get("source")


@functools.cache
def _tables() -> dict[str, dict[str, Any]]:
    """Contents of the files by each of their kinds of device."""
    files = [file for file in resources.files(__name__).iterdir() if file.name.endswith(".json")]
    tables = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {kind: table for table in tables for kind in table["device_kinds"]}
