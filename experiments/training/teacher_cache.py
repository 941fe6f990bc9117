"""A teacher's predictions on disk: computed once, read with the batches by every run that has the same ones.

Files are described in `teacher_manifest`. A shard is listed there when it is complete, so an interrupted writer goes on
with the next one.
"""

import contextlib
import fcntl
import functools
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.cli.outcome import size
from experiments.training.stopping import Stopped, told_to_stop
from experiments.training.teacher import Predict
from experiments.training.teacher_manifest import MANIFEST, Description, Shard, read_shards, write_manifest
from qvdjax.checkpoint import SafetensorsFile, TensorSource, all_finite, write_file
from qvdjax.checkpoint.atomic import disk_errors
from qvdjax.errors import UserError

# What an interruption loses; at least a step.
SHARD_STEPS, SHARD_BYTES = 64, 1 << 28
_AGAIN = "run the same command again, which makes it anew"


class TeacherCache:
    """A folder of predictions by training step; a longer run than before goes on where the folder ends.

    Attributes:
        path: The folder.
        description: What its predictions are.
        shards: Those that are listed, in the order of their steps.
    """

    def __init__(self, path: Path, made_by: Mapping[str, Any], prediction: jax.ShapeDtypeStruct):
        """Find the folder again, or begin one; nothing is written yet.

        Args:
            path: Need not be there.
            made_by: Everything predictions depend on, JSON types.
            prediction: Shape (batch, frames, height, width, channels) and type of one step's.

        Raises:
            UserError: Other files lie there, or predictions that depend on something else; manifest or shards are
                damaged; several processes train together.
        """
        if jax.process_count() > 1:
            remedy = "train without it, or on one host"
            raise UserError("a teacher's predictions are not cached where several hosts train together", remedy=remedy)
        self.path, self.description = Path(path), Description.of(made_by, prediction)
        self.shards = read_shards(self.path, self.description)
        for shard in self.shards:
            self._check_header(shard)

    def missing(self, steps: int) -> list[range]:
        """Which of the first `steps` steps are not there, a range for each shard to write."""
        lost = [shard.steps for shard in self.shards if not (self.path / shard.file).exists()]
        begin = self.shards[-1].steps.stop if self.shards else 0
        count = max(1, min(SHARD_STEPS, SHARD_BYTES // self.description.step_bytes))
        new = [range(first, min(first + count, steps)) for first in range(begin, steps, count)]
        return [part for part in lost if part.start < steps] + new

    def check_space(self, steps: int) -> int:
        """Bytes that `fill` will write for so many steps; 0 where nothing is missing.

        Raises:
            UserError: There is less space than that.
        """
        count = sum(map(len, self.missing(steps)))
        needed = count * self.description.step_bytes
        there = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        with disk_errors(self.path):
            free = shutil.disk_usage(there).free
        if needed > free:
            raise UserError(
                f"the teacher's predictions of {count} steps take {size(needed)} in {self.path}, and {size(free)} are "
                "free there",
                remedy="free some space, choose another folder, or train with fewer steps or with --dtype bfloat16",
            )
        return needed

    def check_data(self, batches: Any) -> None:
        """Refuse at once what `prediction` would refuse at a run's first step.

        Raises:
            UserError: See there.
        """
        if self.shards:
            self._check_batch(self.shards[0], 0, batches[0])

    def fill(self, steps: int, batches: Any, predict: Predict, *, progress: Any = None) -> None:
        """Compute and write what is missing of the first `steps` steps.

        One prediction is in memory at a time. SIGTERM ends it before the next step; the unfinished shard is lost.

        Args:
            steps: Of the run.
            batches: batches[k] is the batch of step k, {latents, context}.
            predict: The teacher.
            progress: Called with ("the teacher's predictions", steps done, steps to do).

        Raises:
            UserError: The folder cannot be written or the disk is full, another process writes it, or a prediction is
                not finite.
            Stopped: The process was told to stop.
        """
        with self._alone(), told_to_stop() as asked:
            self.shards = read_shards(self.path, self.description)  # another process may have written since
            parts = self.missing(steps)
            todo = [step for part in parts for step in part]
            write_manifest(self.path, self.description, self.shards)

            def make(step: int) -> tuple[np.ndarray, int]:
                if asked(step):
                    held = f"{self.path} keeps the teacher's predictions in whole shards"
                    raise Stopped(f"told to stop before step {step}; {held}", remedy="run the same command again")
                batch = batches[step]
                prediction = np.asarray(predict(step, batch))
                if not all_finite(prediction):
                    remedy = "check the model with `qvdjax sample`, and the data of that step"
                    raise UserError(f"the teacher's prediction of step {step} is not finite", remedy=remedy)
                if progress:
                    progress("the teacher's predictions", todo.index(step) + 1, len(todo))
                return prediction, _sum_of_batch(batch)

            for part in parts:
                self._write(part, make)

    def prediction(self, step: int, batch: Mapping[str, np.ndarray]) -> np.ndarray:
        """The teacher's prediction of a step, (batch, frames, height, width, channels).

        Args:
            step: Of the run, from 0.
            batch: {latents, context} of this step.

        Raises:
            UserError: It is not there, its shard is damaged, or it was made from another batch.
        """
        shard = next((shard for shard in self.shards if step in shard.steps), None)
        if shard is None:
            raise UserError(f"{self.path} holds no prediction of step {step}", remedy=_AGAIN)
        self._check_batch(shard, step, batch)
        damaged = UserError(f"{self.path / shard.file} is damaged at step {step}", remedy=f"delete it and {_AGAIN}")
        try:
            found = SafetensorsFile(self.path / shard.file).read(_name(step))
        except UserError as error:
            raise damaged from error
        if (found.shape, found.dtype) != (self.description.shape, self.description.dtype):
            raise damaged
        if _sum_of(found) != shard.predictions[step - shard.first]:
            raise damaged
        return found

    def _check_batch(self, shard: Shard, step: int, batch: Mapping[str, np.ndarray]) -> None:
        if _sum_of_batch(batch) != shard.batches[step - shard.first]:
            raise UserError(
                f"{self.path} holds the teacher's predictions on other data than that of step {step}",
                remedy="name the folder of latents it was made with, or another folder for the predictions",
            )

    def _check_header(self, shard: Shard) -> None:
        """Raise UserError where a shard's file is there and is not what is listed; its values are not read."""
        file = self.path / shard.file
        if not file.exists():
            return  # it is missing, and will be made again
        try:
            tensors = SafetensorsFile(file).tensors
        except UserError as error:
            raise UserError(error.message, remedy=f"delete {file} and {_AGAIN}") from error
        wanted = {_name(step): (self.description.shape, self.description.dtype) for step in shard.steps}
        if {name: (info.shape, info.dtype) for name, info in tensors.items()} != wanted:
            raise UserError(f"{file} holds other tensors than {MANIFEST} says", remedy=f"delete it and {_AGAIN}")

    def _write(self, steps: range, make: Callable[[int], tuple[np.ndarray, int]]) -> None:
        """Write the shard of some steps, then list it. make(step) -> prediction, and the sum of its batch."""
        shape, dtype, file = (
            self.description.shape,
            self.description.dtype,
            f"predictions-{steps.start:08d}.safetensors",
        )
        batches, predictions = [], []

        def values(step: int) -> np.ndarray:
            prediction, of_batch = make(step)
            batches.append(of_batch)
            predictions.append(_sum_of(prediction))
            return prediction

        write_file(
            self.path / file,
            [TensorSource(_name(step), shape, dtype, functools.partial(values, step)) for step in steps],
        )
        others = [shard for shard in self.shards if shard.first != steps.start]
        made = Shard(file, steps.start, tuple(batches), tuple(predictions))
        self.shards = sorted([*others, made], key=lambda shard: shard.first)
        write_manifest(self.path, self.description, self.shards)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """One process writes at a time. The lock goes with its process, however that ends; what it left is removed."""
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                remedy = "wait for it, then run the same command again"
                raise UserError(f"another process writes {self.path}", remedy=remedy) from error
            for unfinished in self.path.glob(".*.partial-*"):
                unfinished.unlink()
            yield


class Taught:
    """Batches with what the teacher predicts from them: `taught[k]` is batches[k] and `teacher`.

    Args:
        batches: batches[k] is the batch of step k, {latents, context}.
        cache: Holds those steps.
    """

    def __init__(self, batches: Any, cache: TeacherCache):
        self.batches, self.cache = batches, cache

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        batch = self.batches[step]
        return {**batch, "teacher": self.cache.prediction(step, batch)}


def _name(step: int) -> str:
    return f"prediction.{step}"


def _sum_of(*arrays: np.ndarray) -> int:
    """CRC-32 of their bytes, one after the other: it tells damage and other data, not what somebody made to fit."""
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, total)  # any shape -> [bytes]
    return total


def _sum_of_batch(batch: Mapping[str, np.ndarray]) -> int:
    return _sum_of(batch["latents"], batch["context"])
