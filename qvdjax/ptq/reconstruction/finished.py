"""Finished blocks on disk, so that an interrupted reconstruction goes on at the block that it had reached.

reconstruction.json        what is reconstructed, and how
<block>.safetensors        everything that was trained of a block, and its report in the metadata
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvdjax.checkpoint import SafetensorsFile, TensorSource, read_json, write_file
from qvdjax.checkpoint.atomic import disk_errors, new_file
from qvdjax.errors import UserError
from qvdjax.parallel import on_first, to_host, together

MANIFEST = "reconstruction.json"


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """What reconstruction did for a block.

    Attributes:
        name: In diffusers; of several blocks that have one there, with a number behind it. "temporal_features" for the
            layers that are trained on the timestep alone.
        before, after: Squared error of its output relative to the square of what it changes of the stream (of a UNet,
            where the output is of another shape, relative to its own square), tokens weighed, with what is trained as
            it started and as it is now; weights rounded to nearest codes, or as training decided.
        seconds: It took.
    """

    name: str
    before: float
    after: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class FinishedBlocks:
    """A folder of finished blocks.

    Attributes:
        folder: It.
    """

    folder: Path

    @classmethod
    def open(cls, folder: Path, made_by: Mapping[str, Any]) -> "FinishedBlocks":
        """The folder, made if it is not there.

        Args:
            folder: Where.
            made_by: Everything that results depend on, as JSON types.

        Raises:
            UserError: It holds blocks of something else, or cannot be written.
        """
        made_by = json.loads(json.dumps(made_by))
        on_first(_begin, folder, made_by)
        if together(read_json, folder / MANIFEST) != made_by:
            raise UserError(
                f"{folder} holds blocks that were reconstructed from something else",
                remedy="delete it or choose another folder",
            )
        return cls(folder)

    def get(self, name: str) -> tuple[dict[str, np.ndarray], BlockReport] | None:
        """Arrays and report of a block; None for one that is not finished.

        Raises:
            UserError: Its file is corrupt.
        """
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            return None
        file = SafetensorsFile(path)
        return {name: np.asarray(file.read(name)) for name in file.tensors}, _report(file)

    def reports(self) -> list[BlockReport]:
        """Of all blocks, in the order in which they were finished."""
        paths = sorted(self.folder.glob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        return [_report(SafetensorsFile(path)) for path in paths]

    def put(self, report: BlockReport, arrays: Mapping[str, Any]) -> None:
        """Keep a block; the file appears complete or not at all, written by the first of several processes."""
        arrays = {name: to_host(a) for name, a in arrays.items()}
        sources = [TensorSource(name, a.shape, a.dtype, lambda a=a: a) for name, a in arrays.items()]
        path = self.folder / f"{report.name}.safetensors"
        on_first(write_file, path, sources, {"report": json.dumps(dataclasses.asdict(report))})


def _report(file: SafetensorsFile) -> BlockReport:
    """What a block's file says of it in its header."""
    try:
        return BlockReport(**json.loads(file.metadata["report"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file.path} is no finished block: {error}", remedy="delete it and go on") from error


def _begin(folder: Path, made_by: Mapping[str, Any]) -> None:
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            with new_file(folder / MANIFEST) as temporary:
                temporary.write_text(json.dumps(made_by, indent=2), encoding="utf-8")
