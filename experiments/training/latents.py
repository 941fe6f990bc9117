"""A folder of precomputed latents and text embeddings, what training and calibration read.

    manifest.json            {"format": "qvdjax-data", "version": 1, "count": N,
                              "latents": [frames, height, width, channels], "context": [tokens, dim],
                              "shards": [{"file": "data-00000.safetensors", "count": n}, ...],
                              "prompts": "prompts.json"}
    prompts.json             list of N strings, the caption of each example
    data-XXXXX.safetensors   latents (n, frames, height, width, channels), context (n, tokens, dim), float32

The folder appears under its name when all of it is written.
"""

import bisect
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open

from qvdjax.checkpoint import TensorSource, new_folder, write_file
from qvdjax.checkpoint.atomic import disk_errors
from qvdjax.errors import UserError

MANIFEST: Final = "manifest.json"
_FIELDS: Final = ("latents", "context")


def write_folder(path: Path, examples: Iterable[dict[str, Any]], *, shard: int = 512) -> None:
    """Write examples {latents, context, prompt} to a new folder, holding one shard in memory at a time.

    Raises:
        UserError: The folder exists and is not empty, or cannot be written, or there are no examples.
    """
    with new_folder(path) as unfinished, disk_errors(Path(path)):
        _write(unfinished, iter(examples), shard)


def _write(path: Path, examples: Iterator[dict[str, Any]], shard: int) -> None:
    shards: list[dict[str, Any]] = []
    prompts: list[str] = []
    shapes: dict[str, list[int]] = {}
    pending: list[dict[str, Any]] = []

    def flush() -> None:
        stacked = {name: np.stack([row[name] for row in pending]).astype(np.float32) for name in _FIELDS}
        file = f"data-{len(shards):05d}.safetensors"
        write_file(path / file, [TensorSource(k, v.shape, v.dtype, lambda v=v: v) for k, v in stacked.items()])
        shapes.update({name: list(value.shape[1:]) for name, value in stacked.items()})
        shards.append({"file": file, "count": len(pending)})
        prompts.extend(row["prompt"] for row in pending)
        pending.clear()

    for row in examples:
        pending.append(row)
        if len(pending) == shard:
            flush()
    if pending:
        flush()
    if not shards:
        raise UserError("no examples to write", remedy="ask for at least one")
    (path / "prompts.json").write_text(json.dumps(prompts, indent=0))
    manifest = {"format": "qvdjax-data", "version": 1, "count": len(prompts), **shapes, "shards": shards,
                "prompts": "prompts.json"}  # fmt: skip
    (path / MANIFEST).write_text(json.dumps(manifest, indent=1))


class DataFolder:
    """Random access to a data folder: `len(folder)`, `folder[i]` -> {latents, context} (float32)."""

    def __init__(self, path: Path):
        """Read the manifest.

        Raises:
            UserError: There is no manifest, or it is not one of ours, or a shard is missing.
        """
        self.path = Path(path)
        remedy = "make the folder with `python -m experiments.moving_shapes.data OUT`"
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path} has no readable {MANIFEST}", remedy=remedy) from error
        if not isinstance(manifest, dict) or manifest.get("format") != "qvdjax-data" or manifest.get("version") != 1:
            raise UserError(f"{self.path / MANIFEST} is not a qvdjax-data manifest of version 1", remedy=remedy)
        try:
            self.shapes = {name: tuple(int(size) for size in manifest[name]) for name in _FIELDS}
            self.files = [self.path / shard["file"] for shard in manifest["shards"]]
            self.starts = list(itertools.accumulate((int(s["count"]) for s in manifest["shards"]), initial=0))
        except (KeyError, TypeError, ValueError) as error:
            message = f"{self.path / MANIFEST} lacks or misspells a field ({error})"
            raise UserError(message, remedy=remedy) from error
        missing = [file.name for file in self.files if not file.is_file()]
        if missing:
            raise UserError(f"{self.path} lacks shards", remedy="copy the whole folder or make it again", items=missing)
        if self.starts[-1] == 0:
            raise UserError(f"{self.path} holds no examples", remedy=remedy)

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """One example.

        Raises:
            UserError: Its shard is damaged, holds other shapes than the manifest says, or values not finite.
        """
        shard = bisect.bisect_right(self.starts, index) - 1
        file, row = self.files[shard], index - self.starts[shard]
        try:
            # The file is opened again for every example: mapped pages stay resident while it is open.
            with safe_open(file, framework="numpy") as opened:
                example = {name: opened.get_slice(name)[row] for name in _FIELDS}
        except (SafetensorError, IndexError, OSError) as error:
            message = f"{file} is not a readable data shard ({error})"
            raise UserError(message, remedy="make the folder again") from error
        for name, value in example.items():
            if value.shape != self.shapes[name] or not np.isfinite(value).all():
                message = f"{file}: {name} of example {row} is no finite array of shape {self.shapes[name]}"
                raise UserError(message, remedy="make the folder again")
        return example


def stream(path: Path, *, seed: int, size: int, rows: Sequence[int] | None = None) -> Any:
    """Endless shuffled stacked batches as a `grain.MapDataset`; batch k depends on (seed, k) alone.

    Args:
        path: A data folder.
        seed: Of the order.
        size: Examples in a batch.
        rows: Of each batch, those that are read, see `qvdjax.parallel.process_rows`; None for all.
    """
    import grain

    folder = DataFolder(path)

    def read(numbers: np.ndarray) -> dict[str, np.ndarray]:
        examples = [folder[int(number)] for number in (numbers if rows is None else numbers[np.asarray(rows)])]
        return {name: np.stack([example[name] for example in examples]) for name in _FIELDS}

    # The order is drawn over the numbers of the examples, so that a process need not read what others train on.
    return grain.MapDataset.source(range(len(folder))).seed(seed).shuffle().repeat(None).batch(size).map(read)
