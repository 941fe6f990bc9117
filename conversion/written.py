"""Writing a folder of weights so that it is only there once it was read back and is what was meant."""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qvdjax.checkpoint import CheckpointFolder, Expected, Progress, TensorSource, check_tensors, new_folder
from qvdjax.checkpoint.folder import STEM, write_folder
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class PlannedFolder:
    """A folder of weights that is to be written.

    Attributes:
        config: Becomes config.json.
        tensors: What its files will hold.
        expected: What its model asks for, by name.
        stem: What its files of weights are called.
        side_files: Name -> file, copied along.
    """

    config: Mapping
    tensors: Sequence[TensorSource]
    expected: Mapping[str, Expected]
    stem: str = STEM
    side_files: Mapping[str, Path] = dataclasses.field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)


def write_checked(
    path: str | os.PathLike, planned: PlannedFolder, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a folder, read every tensor back and compare its checksum; only then it appears under its name.

    Memory is bounded by the largest tensor, in writing and in checking.

    Args:
        path: The new folder.
        planned: What it will hold.
        overwrite: Replace a folder that is there already.
        progress: As for `write_folder`, then called with ("checking", bytes done, bytes in all).

    Raises:
        UserError: See `write_folder`; what was read back is not what was written.
    """
    sums: dict[str, int] = {}
    with new_folder(path, overwrite=overwrite) as folder:
        write_folder(
            folder, planned.config, [_summed(tensor, sums) for tensor in planned.tensors],
            side_files=planned.side_files, stem=planned.stem, progress=progress,
        )  # fmt: skip
        _read_back(folder, planned, sums, progress, Path(path))


def checksum(values: np.ndarray) -> int:
    """CRC-32 of an array's bytes."""
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


def _summed(tensor: TensorSource, sums: dict[str, int]) -> TensorSource:
    """The same tensor, whose checksum is noted when it is made."""

    def make() -> np.ndarray:
        values = tensor.make()
        sums[tensor.name] = checksum(values)
        return values

    return dataclasses.replace(tensor, make=make)


def _read_back(folder: Path, planned: PlannedFolder, sums: Mapping[str, int], progress: Progress | None, name: Path):
    opened = CheckpointFolder.open(folder, stem=planned.stem)
    check_tensors(planned.expected, {key: opened.info(key) for key in opened.keys}, str(name))

    def differs(tensor: TensorSource) -> bool:  # a scope of its own: one tensor is let go before the next is read
        values = opened.read(tensor.name)
        return values.dtype != tensor.dtype or checksum(values) != sums[tensor.name]

    done, wrong = 0, []
    for tensor in planned.tensors:
        if differs(tensor):
            wrong.append(tensor.name)
        done += tensor.nbytes
        if progress:
            progress("checking", done, planned.nbytes)
    if wrong:
        raise UserError(
            f"{name}: what was read back is not what was written", remedy="check the disk and convert again",
            items=wrong,
        )  # fmt: skip
