"""A model folder as diffusers lays it out: config.json and one safetensors file, or several and an index."""

import collections
import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from qvdjax.checkpoint.atomic import disk_errors, new_folder
from qvdjax.checkpoint.header import TensorInfo
from qvdjax.checkpoint.safetensors_file import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorSource,
    aligned,
)
from qvdjax.errors import UserError

CONFIG = "config.json"
STEM = "diffusion_pytorch_model"
WEIGHTS = f"{STEM}.safetensors"
INDEX = f"{STEM}.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total): called now and then during a long job; here in bytes."""


def read_json(path: Path) -> dict:
    """The JSON object in a file.

    Raises:
        UserError: The file is missing, unreadable, or holds no JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", remedy="check the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}", remedy="restore the file") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object", remedy="restore the file")
    return value


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """The checked table of contents of a model folder. No weight is read until `read`.

    Attributes:
        path: The folder.
        config: The content of config.json; empty if it was not required and is not there.
        files: Which file holds each tensor.
    """

    path: Path
    config: dict
    files: Mapping[str, SafetensorsFile]

    @classmethod
    def open(cls, path: str | os.PathLike, *, require_config: bool = True, stem: str = STEM) -> Self:
        """Read config, index and headers; `stem` is what its files of weights are called.

        Raises:
            UserError: The folder, its config or its weights are missing; a header is corrupt (see
                `read_header`); the index and the shards disagree.
        """
        path = Path(path)
        if not path.is_dir():
            what = "is a file, not a model folder" if path.exists() else "does not exist"
            raise UserError(f"{path} {what}", remedy="name a model folder")
        if not any(path.iterdir()):
            raise UserError(f"{path} is empty", remedy="name a model folder (config.json and safetensors)")
        has_config = (path / CONFIG).exists()
        if require_config and not has_config:
            raise UserError(
                f"{path} holds no {CONFIG}", remedy="name a model folder, or make one with `qvdjax convert`"
            )
        config = read_json(path / CONFIG) if has_config else {}
        return cls(path, config, _files(path, stem))

    @property
    def keys(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self.files)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in their files."""
        return sum(self.info(key).nbytes for key in self.keys)

    def info(self, key: str) -> TensorInfo:
        """Shape and type of one tensor."""
        return self.files[key].tensors[key]

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor or a part of it; see `SafetensorsFile.read`."""
        return self.files[key].read(key, index)


def _files(path: Path, stem: str) -> dict[str, SafetensorsFile]:
    weights = f"{stem}.safetensors"
    single, index = path / weights, path / f"{weights}.index.json"
    if single.exists() and index.exists():
        raise UserError(
            f"{path} holds both {weights} and an index of shards", remedy="delete the one that is out of date"
        )
    if single.exists():
        return _open(single)
    if index.exists():
        return read_shards(index)
    others = sorted(f.name for f in path.glob("*") if f.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"))
    if others:
        ours, theirs = "bring it into shape with `qvdjax convert`", f"save the weights as {weights}"
        raise UserError(f"{path} holds no {weights}, but", remedy=ours if stem == STEM else theirs, items=others)
    raise UserError(f"{path} holds no weights ({weights})", remedy="name a model folder")


def _open(path: Path) -> dict[str, SafetensorsFile]:
    file = SafetensorsFile(path)
    return dict.fromkeys(file.tensors, file)


def read_shards(index: Path) -> dict[str, SafetensorsFile]:
    """Which file holds each tensor, from a `*.safetensors.index.json`.

    Raises:
        UserError: A shard is missing or corrupt; a key is in two shards; index and shards name different
            keys.
    """
    where = read_json(index).get("weight_map")
    names_are_plain = isinstance(where, dict) and all(
        isinstance(name, str) and name and Path(name).name == name for name in where.values()
    )
    if not names_are_plain:
        raise UserError(f"{index} holds no weight_map of keys to file names", remedy="restore the file")
    if missing := sorted({name for name in where.values() if not (index.parent / name).is_file()}):
        raise UserError(
            f"{index.parent} lacks shards that its index names", remedy="download them again", items=missing
        )
    files: dict[str, SafetensorsFile] = {}
    for name in sorted(set(where.values())):
        shard = _open(index.parent / name)
        if twice := sorted(files.keys() & shard.keys()):
            raise UserError(
                f"{index.parent}: keys in more than one shard", remedy="write the folder again", items=twice
            )
        files |= shard
    wrong = [
        f"{key} (not in {name})" for key, name in where.items() if key not in files or files[key].path.name != name
    ]
    wrong += [f"{key} (not in the index)" for key in files if key not in where]
    if wrong:
        raise UserError(f"{index} and its shards disagree", remedy="write the folder again", items=wrong)
    return files


def nonfinite_error(where: str, bad: Iterable[str]) -> UserError:
    """What the user reads about tensors that hold NaN or infinity."""
    remedy = "download or train the checkpoint again"
    return UserError(f"{where} holds NaN or infinite weights", remedy=remedy, items=list(bad))


def write_folder(
    path: str | os.PathLike,
    config: Mapping,
    tensors: Iterable[TensorSource],
    *,
    side_files: Mapping[str, Path | bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    stem: str = STEM,
    progress: Progress | None = None,
):
    """Write a model folder; it appears under its name complete, or not at all.

    Memory is bounded by the largest tensor. Above `max_shard_bytes` the weights go into several files with an
    index.

    Args:
        path: The new folder.
        config: Becomes config.json.
        tensors: What to write; each is made when its turn comes.
        side_files: File name -> its content, or a file to copy.
        metadata: Strings for the header of every safetensors file, beside `format: pt`.
        overwrite: Replace a folder that is there already.
        max_shard_bytes: A single larger tensor gets a file of its own.
        stem: What the files of weights are called, diffusers' name by default.
        progress: Called with ("writing", bytes done, bytes in all) after each tensor; of several files each counts for
            itself, as "writing shard 1 of 3".

    Raises:
        UserError: The target exists or cannot be written; the disk is full; two tensors have one name.
    """
    shards = writing_order(tensors, max_shard_bytes)
    counts = collections.Counter(tensor.name for shard in shards for tensor in shard)
    if twice := sorted(name for name, count in counts.items() if count > 1):
        raise UserError("several tensors share a name", remedy="give each its own", items=twice)
    sizes, count = [sum(tensor.nbytes for tensor in shard) for shard in shards], len(shards)
    many = count > 1
    whole = f"{stem}.safetensors"
    files = [f"{stem}-{i:05}-of-{count:05}.safetensors" if many else whole for i in range(1, count + 1)]
    with new_folder(path, overwrite=overwrite) as folder:
        for number, (name, shard, size) in enumerate(zip(files, shards, sizes), 1):
            stage, done = f"writing shard {number} of {count}" if many else "writing", 0
            with SafetensorsWriter(folder / name, shard, {"format": "pt", **(metadata or {})}) as writer:
                for tensor in writer.tensors:
                    writer.write(tensor)
                    done += tensor.nbytes
                    if progress:
                        progress(stage, done, size)
        if many:
            where = {tensor.name: name for name, shard in zip(files, shards) for tensor in shard}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": dict(sorted(where.items()))}
            _write(folder / f"{whole}.index.json", _json(index))
        _write(folder / CONFIG, _json(dict(config)))
        for name, content in (side_files or {}).items():
            _write(folder / name, content if isinstance(content, bytes) else Path(content).read_bytes())


def writing_order(tensors: Iterable[TensorSource], limit: int = MAX_SHARD_BYTES) -> list[list[TensorSource]]:
    """The tensors of each file: one file after the other is filled in the given order, as diffusers does."""
    shards, size = [[]], 0
    for tensor in tensors:
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return [aligned(shard) for shard in shards]


def _json(value: dict) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _write(path: Path, content: bytes):
    with disk_errors(path), path.open("wb") as file:
        file.write(content)
