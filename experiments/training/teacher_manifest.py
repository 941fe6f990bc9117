"""What a folder of a teacher's predictions says of itself.

    manifest.json                     {"format": "qvdjax-teacher", "version": 1, "made_by": {...},
                                       "shape": [batch, frames, height, width, channels], "dtype": "float32",
                                       "shards": [{"file": "predictions-00000000.safetensors", "first": 0,
                                                   "batches": [...], "predictions": [...]}, ...]}
    predictions-XXXXXXXX.safetensors  `prediction.<step>` of every step from `first` on, (batch, frames, ...)

`made_by` is everything predictions depend on. `batches` and `predictions` are CRC-32 sums, one a step: of the batch the
prediction was made from, and of the prediction.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import jax
import numpy as np

from qvdjax.checkpoint import read_json
from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError

MANIFEST: Final = "manifest.json"
FORMAT, VERSION = "qvdjax-teacher", 1


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of predictions.

    Attributes:
        file: Its name in the folder.
        first: Its first step.
        batches, predictions: Sums, one a step.
    """

    file: str
    first: int
    batches: tuple[int, ...]
    predictions: tuple[int, ...]

    @property
    def steps(self) -> range:
        """Whose predictions it holds."""
        return range(self.first, self.first + len(self.predictions))


@dataclasses.dataclass(frozen=True)
class Description:
    """What the predictions of a folder are.

    Attributes:
        made_by: Everything they depend on, JSON types.
        shape: Of one step's: (batch, frames, height, width, channels).
        dtype: Of their values.
    """

    made_by: Mapping[str, Any]
    shape: tuple[int, ...]
    dtype: np.dtype

    @classmethod
    def of(cls, made_by: Mapping[str, Any], prediction: jax.ShapeDtypeStruct) -> "Description":
        """From one step's prediction."""
        return cls(json.loads(json.dumps(made_by)), tuple(prediction.shape), np.dtype(prediction.dtype))

    @property
    def step_bytes(self) -> int:
        """Bytes of one step's prediction."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def fields(self) -> dict[str, Any]:
        """As the manifest has them."""
        return {"made_by": self.made_by, "shape": list(self.shape), "dtype": str(self.dtype)}


def read_shards(folder: Path, description: Description) -> list[Shard]:
    """The shards that a folder's manifest lists, in the order of their steps; none of a folder that is yet to be.

    Raises:
        UserError: Other files lie there, the predictions are others than described, or the manifest is damaged.
    """
    file, other = folder / MANIFEST, "choose another folder for the predictions"
    if not file.exists():
        # Hidden files are those of a writer that was killed at once.
        if folder.exists() and (not folder.is_dir() or any(path.name[0] != "." for path in folder.iterdir())):
            raise UserError(f"{folder} holds something else", remedy=other)
        return []
    manifest = read_json(file)
    if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise UserError(f"{file} is no {FORMAT} of version {VERSION}", remedy=other)
    here = _flat(description.fields())
    held = _flat({name: manifest.get(name) for name in description.fields()})
    if different := sorted(name for name in held | here if held.get(name) != here.get(name)):
        raise UserError(
            f"{folder} holds a teacher's predictions that this run cannot use",
            remedy=f"train as `made_by` in its {MANIFEST} says, or {other}",
            items=[f"{name}: {held.get(name)} there, {here.get(name)} here" for name in different],
        )
    try:
        return _in_order(manifest["shards"])
    except (KeyError, TypeError, ValueError) as error:
        message = f"{file} lists no shards that follow each other ({error})"
        raise UserError(message, remedy=f"delete {folder} and run the same command again") from error


def write_manifest(folder: Path, description: Description, shards: Iterable[Shard]) -> None:
    """Replace the manifest; UserError where it cannot be written."""
    listed = [dataclasses.asdict(shard) for shard in shards]
    manifest = {"format": FORMAT, "version": VERSION, **description.fields(), "shards": listed}
    with new_file(folder / MANIFEST) as unfinished:
        unfinished.write_text(json.dumps(manifest, indent=1) + "\n")


def _in_order(listed: Any) -> list[Shard]:
    """Shards without a gap between them; ValueError, KeyError or TypeError where they are not."""
    shards, end = [], 0
    for fields in listed:
        shard = Shard(fields["file"], fields["first"], tuple(fields["batches"]), tuple(fields["predictions"]))
        if Path(shard.file).name != shard.file or shard.first != end:
            raise ValueError(f"at step {end}")
        if not len(shard.predictions) == len(shard.batches) > 0:
            raise ValueError(f"sums at step {end}")
        shards.append(shard)
        end = shard.steps.stop
    return shards


def _flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Mappings inside as dotted names."""
    found: dict[str, Any] = {}
    for name, value in fields.items():
        found |= _flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {f"{above}{name}": value}
    return found
