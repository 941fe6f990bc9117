"""Calibration sets: the inputs that a model met while sampling, in a folder.

    manifest.json            {"format": "qvdjax-calibration", "version": 1, "samples": [...], and how it was made}
    sample-0000.safetensors  latents (steps, frames, height, width, channels), timestep (steps,),
                             context (tokens, dim), negative_context (tokens, dim), and of a model with further inputs
                             condition.<name> (...), the same at every step

One file holds one prompt's whole trajectory; both guidance branches see the same latents, so these are stored once.
Each entry of "samples" names a file, its prompt and its seed. A file appears under its name when it is complete, so an
interrupted collection goes on with the prompts whose files are not there.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from qvdjax.checkpoint import SafetensorsFile, TensorSource, read_json, write_file
from qvdjax.checkpoint.atomic import disk_errors, new_file
from qvdjax.diffusion.guidance import of_branch
from qvdjax.errors import UserError
from qvdjax.parallel import on_first, together

MANIFEST = "manifest.json"
FORMAT, VERSION = "qvdjax-calibration", 1
TENSORS = ("latents", "timestep", "context", "negative_context")
CONDITION = "condition."


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """The model's inputs while one video was sampled.

    Attributes:
        latents: float32 (steps, frames, height, width, channels), before each step.
        timestep: float32 (steps,).
        context, negative_context: float32 (tokens, dim) each.
        conditions: Further inputs of the model by name, float32, without a batch axis; `negative_<name>` is for the
            negative prompt.
    """

    latents: np.ndarray
    timestep: np.ndarray
    context: np.ndarray
    negative_context: np.ndarray
    conditions: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors by their names in a file, float32."""
        named = {name: getattr(self, name) for name in TENSORS}
        named |= {CONDITION + name: array for name, array in self.conditions.items()}
        return {name: np.asarray(array, np.float32, order="C") for name, array in named.items()}

    def inputs(self, steps: Sequence[int], batch: int = 1) -> Iterator[dict[str, np.ndarray]]:
        """Keyword arguments of the model's call at some steps, with the prompt and then with the negative prompt;
        `batch` rows at a time (the last of a branch may have fewer)."""
        for context, negative in ((self.context, False), (self.negative_context, True)):
            for start in range(0, len(steps), batch):
                rows = list(steps[start : start + batch])
                same = {"context": context, **of_branch(self.conditions, negative=negative)}
                spread = {name: np.broadcast_to(a, (len(rows), *a.shape)) for name, a in same.items()}
                yield {"latents": self.latents[rows], "timestep": self.timestep[rows], **spread}


@dataclasses.dataclass(frozen=True)
class CalibrationSet:
    """A folder of trajectories.

    Attributes:
        path: The folder.
        manifest: Its description.
    """

    path: Path
    manifest: Mapping[str, Any]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """Read the manifest.

        Raises:
            UserError: No manifest, another format or version, or samples whose files are missing.
        """
        path = Path(path)
        if not (path / MANIFEST).is_file():
            raise UserError(f"{path} holds no {MANIFEST}", remedy="name a folder made by `qvdjax calibrate`")
        manifest = read_json(path / MANIFEST)
        if (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
            raise UserError(f"{path / MANIFEST} is no {FORMAT} of version {VERSION}", remedy="calibrate again")
        samples = manifest.get("samples")
        if not isinstance(samples, list) or not all(
            isinstance(s, dict) and isinstance(s.get("file"), str) for s in samples
        ):
            raise UserError(f"{path / MANIFEST} lists no samples", remedy="calibrate again")
        if missing := [s["file"] for s in samples if not (path / s["file"]).is_file()]:
            raise UserError(
                f"{path} lacks samples", remedy="run `qvdjax calibrate` again to complete it", items=missing
            )
        return cls(path, manifest)

    def __len__(self) -> int:
        return len(self.manifest["samples"])

    def trajectory(self, number: int) -> Trajectory:
        """One sample; UserError where its file is corrupt."""
        return read_trajectory(self.path / self.manifest["samples"][number]["file"])

    def batches(self, batch: int = 8) -> Iterator[dict[str, np.ndarray]]:
        """Keyword arguments of the model's call: every step of every sample, with the prompt and with the
        negative prompt; `batch` rows at a time (the last of a branch may have fewer)."""
        for number in range(len(self)):
            sample = self.trajectory(number)
            yield from sample.inputs(range(len(sample.timestep)), batch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self.batches()


def read_trajectory(path: Path) -> Trajectory:
    """One sample file.

    Raises:
        UserError: It is corrupt, lacks a tensor, or its tensors do not belong together.
    """
    file = SafetensorsFile(path)
    if missing := [name for name in TENSORS if name not in file.tensors]:
        raise UserError(f"{path} lacks tensors", remedy="delete it and calibrate again", items=missing)
    arrays = {name: np.asarray(file.read(name), np.float32) for name in file.tensors}
    conditions = {name.removeprefix(CONDITION): array for name, array in arrays.items() if name.startswith(CONDITION)}
    sample = Trajectory(**{name: arrays[name] for name in TENSORS}, conditions=conditions)
    steps = len(sample.timestep)
    fits = sample.latents.ndim == 5 and len(sample.latents) == steps and sample.context.ndim == 2
    if not fits or sample.context.shape != sample.negative_context.shape:
        raise UserError(f"{path}: its tensors do not belong together", remedy="delete it and calibrate again")
    return sample


def collect(
    path: str | os.PathLike, made_by: Mapping[str, Any], samples: list[Mapping[str, Any]],
    make: Callable[[int], Trajectory], *, progress: Callable[[str, int, int], None] | None = None,
) -> CalibrationSet:  # fmt: skip
    """Fill a folder, going on where an earlier call was interrupted. Several processes all call this; the first one
    writes, and all of them see the folder.

    Args:
        path: The folder; made if it is not there.
        made_by: How the set is made (model, solver, steps, guidance ...), for the manifest.
        samples: What each sample is (prompt, seed).
        make: Number of a sample -> its trajectory.
        progress: Called with ("calibrating", samples done, samples in all).

    Raises:
        UserError: The folder holds a set made in another way, or cannot be written.
    """
    path = Path(path)
    entries = [{"file": f"sample-{i:04d}.safetensors", **sample} for i, sample in enumerate(samples)]
    on_first(_begin, path, {"format": FORMAT, "version": VERSION, **made_by, "samples": entries})
    for number, entry in enumerate(entries):
        # No process writes this file before all have looked: its trajectory takes all of them.
        if not (path / entry["file"]).exists():
            sample = make(number)
            sources = [TensorSource(name, a.shape, a.dtype, lambda a=a: a) for name, a in sample.arrays.items()]
            on_first(write_file, path / entry["file"], sources)
        if progress:
            progress("calibrating", number + 1, len(entries))
    return together(CalibrationSet.open, path)


def _begin(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, or check that it is there already."""
    with disk_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if (path / MANIFEST).exists():
            if read_json(path / MANIFEST) != json.loads(json.dumps(manifest)):
                raise UserError(f"{path} holds a set made in another way", remedy="choose another folder or delete it")
        elif any(path.iterdir()):
            raise UserError(f"{path} exists and is not empty", remedy="choose another folder")
        else:
            with new_file(path / MANIFEST) as temporary:
                temporary.write_text(json.dumps(manifest, indent=2), encoding="utf-8")
