"""What a model folder needs beside the transformer to turn prompts into videos.

pipeline.json:

    {"format": "qvdjax-pipeline", "version": 1,
     "context": {"kind": "word_table", "file": "word_table.safetensors", "tokens": 8},
     "latents": {"frames": 9, "height": 16, "width": 16, "channels": 12},
     "decoder": {"kind": "depth_to_space", "factor": 2},
     "solver": {"name": "unipc", "shift": 3.0, "steps": 20, "guidance_scale": 4.0},
     "fps": 8, "negative_prompt": ""}

Beside name, steps and guidance_scale the solver's part holds fields of the solver, those that are not its defaults.

word_table.safetensors: tensor "embeddings" float32 (words, dim); header metadata "words", a JSON list.

Prompts are looked up word by word in a fixed table, and latents are RGB folded space-to-depth, which a decoder with
"enlarge": n shows n times as high and wide, and one with "frame_factor": n unfolds to n times as many frames: enough
for models that need neither a text encoder nor an autoencoder.
Published models' folders have no `pipeline.json`.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from einops import rearrange, reduce

from models.scheduler import SCHEDULER, scheduler_file
from qvdjax.checkpoint.atomic import new_file
from qvdjax.checkpoint.folder import read_json
from qvdjax.checkpoint.safetensors_file import SafetensorsFile, TensorSource, write_file
from qvdjax.diffusion import SOLVERS, Solver, get_solver, related_solver
from qvdjax.errors import UserError

FILE = "pipeline.json"
WORD_TABLE = "word_table.safetensors"
FORMAT, VERSION = "qvdjax-pipeline", 1


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """Prompt encoder, latent decoder and sampling defaults of one model folder.

    Attributes:
        words: The words a prompt may hold, in lower case.
        embeddings: Their vectors, float32 (words, dim).
        tokens: Length of a context: the longest prompt, in words.
        frames, height, width, channels: Of one video's latents.
        factor: Side of the block of pixels that one latent position holds.
        solver: Name of the default solver, see `qvdjax.diffusion.get_solver`.
        shift: Its shift, for flow matching; None for a solver that has none.
        steps: Default number of steps.
        guidance_scale: Default guidance; 1 is none.
        fps: Frames a second of the written video.
        negative_prompt: What guidance leads away from; "" is the empty prompt.
        solver_options: Further fields of the default solver by name, as for `get_solver`.
        enlarge: Decoding makes each of those pixels so many times as high and wide, by linear interpolation.
        frame_factor: So many successive frames of the video are one frame of latents, side by side in its channels.
    """

    words: tuple[str, ...]
    embeddings: np.ndarray
    tokens: int
    frames: int
    height: int
    width: int
    channels: int
    factor: int
    solver: str
    shift: float | None
    steps: int
    guidance_scale: float
    fps: float
    negative_prompt: str = ""
    solver_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    enlarge: int = 1
    frame_factor: int = 1

    def __post_init__(self):
        if len(self.embeddings) != len(self.words) or self.embeddings.ndim != 2:
            raise UserError(
                f"the word table has {len(self.words)} words and embeddings of shape {self.embeddings.shape}",
                remedy="store one row a word",
            )
        channels = 3 * self.factor**2 * self.frame_factor
        if self.channels != channels:
            of_frames = "" if self.frame_factor == 1 else f" of {self.frame_factor} frames"
            raise UserError(
                f"latents of {self.channels} channels do not hold {self.factor} x {self.factor} RGB pixels{of_frames}",
                remedy=f"they need {channels} channels",
            )
        if not self.fps > 0:
            raise UserError(f"fps is {self.fps}", remedy="give a positive number of frames a second")
        self.make_solver()

    @classmethod
    def load(cls, folder: str | os.PathLike) -> Self:
        """Read a folder's `pipeline.json` and word table.

        Raises:
            UserError: Either is missing, corrupt, of another version, or lacks or doubles something.
        """
        path = Path(folder) / FILE
        if not path.exists():
            raise UserError(
                f"{folder} holds no {FILE}",
                remedy="name a folder that has one, or sample to latents with a file of text embeddings",
            )
        fields = _Fields(path, read_json(path))
        if (fields.take("format", str), fields.take("version", int)) != (FORMAT, VERSION):
            raise UserError(f"{path} is no {FORMAT} file of version {VERSION}", remedy="restore the file")
        context, latents = fields.part("context"), fields.part("latents")
        decoder, solver = fields.part("decoder"), fields.part("solver")
        name = solver.take("name", str)
        options = [field.name for field in dataclasses.fields(SOLVERS[name])] if name in SOLVERS else []
        context.expect("kind", "word_table")
        decoder.expect("kind", "depth_to_space")
        table = context.take("file", str)
        if Path(table).name != table:
            raise UserError(f"{path}: 'context.file' is {table!r}", remedy="name a file of the same folder")
        words, embeddings = _read_word_table(path.parent / table)
        pipeline = cls(
            words=words,
            embeddings=embeddings,
            tokens=context.count("tokens"),
            **{name: latents.count(name) for name in ("frames", "height", "width", "channels")},
            factor=decoder.count("factor"),
            enlarge=decoder.count("enlarge", default=1),
            frame_factor=decoder.count("frame_factor", default=1),
            solver=name,
            shift=solver.take("shift", float) if "shift" in options else None,
            steps=solver.count("steps"),
            guidance_scale=solver.take("guidance_scale", float),
            fps=fields.take("fps", float),
            negative_prompt=fields.take("negative_prompt", str),
            solver_options=solver.rest(),
        )
        for part in (fields, context, latents, decoder, solver):
            part.check_used()
        return pipeline

    def save(self, folder: str | os.PathLike) -> None:
        """Write both files into an existing folder, the word table first; `load` is the inverse.

        Raises:
            UserError: The folder cannot be written or the disk is full.
        """
        folder = Path(folder)
        table = TensorSource("embeddings", self.embeddings.shape, np.dtype(np.float32), lambda: self.embeddings)
        write_file(folder / WORD_TABLE, [table], {"words": json.dumps(self.words)})
        latents = {name: getattr(self, name) for name in ("frames", "height", "width", "channels")}
        shift = {} if self.shift is None else {"shift": self.shift}
        more = {name: getattr(self, name) for name in ("enlarge", "frame_factor") if getattr(self, name) != 1}
        solver = {"name": self.solver, **shift, **self.solver_options, "steps": self.steps}
        text = json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "context": {"kind": "word_table", "file": WORD_TABLE, "tokens": self.tokens},
                "latents": latents,
                "decoder": {"kind": "depth_to_space", "factor": self.factor, **more},
                "solver": {**solver, "guidance_scale": self.guidance_scale},
                "fps": self.fps,
                "negative_prompt": self.negative_prompt,
            },
            indent=2,
        )
        with new_file(folder / FILE) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @property
    def latents_shape(self) -> tuple[int, int, int, int]:
        """(frames, height, width, channels) of one video's latents."""
        return self.frames, self.height, self.width, self.channels

    def make_solver(self, name: str | None = None, **options) -> Solver:
        """The default solver, or the one named; `options` as for `get_solver`.

        What the two have in common is the folder's: its shift, the schedule it was trained on. Raises
        `UserError`, see `related_solver`.
        """
        return related_solver(get_solver(self.solver, **{"shift": self.shift, **self.solver_options}), name, **options)

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        """Prompts -> context, float32 (batch, tokens, dim): a row a word, then zeros; "" is all zeros.

        Case, commas and full stops do not matter. Raises `UserError` for a word that is not in the table and
        for a prompt of too many words.
        """
        context = np.zeros((len(prompts), self.tokens, self.embeddings.shape[1]), np.float32)
        rows = {word: row for row, word in enumerate(self.words)}
        for video, prompt in enumerate(prompts):
            words = prompt.lower().replace(",", " ").replace(".", " ").split()
            unknown = sorted({word for word in words if word not in rows})
            if unknown:
                raise UserError(
                    f"this model does not know some words of the prompt {prompt!r}",
                    remedy=f"it knows {', '.join(self.words)}",
                    items=unknown,
                )
            if len(words) > self.tokens:
                raise UserError(f"the prompt {prompt!r} has {len(words)} words", remedy=f"use at most {self.tokens}")
            context[video, : len(words)] = self.embeddings[[rows[word] for word in words]]
        return context

    def decode(self, latents: Any) -> np.ndarray:
        """Latents (batch, frames, height, width, channels) -> float32 video of the same axes, 3 channels.

        Latents hold RGB in [-1, 1]; what lies outside is clipped, and the result is in [0, 1].
        """
        latents = np.asarray(latents, np.float32)
        self._check_channels(latents, self.channels)
        sizes = {"t": self.frame_factor, "p": self.factor, "q": self.factor}
        video = rearrange(latents, "b f h w (t p q c) -> b (f t) (h p) (w q) c", **sizes)
        if self.enlarge > 1:
            down, across = (_interpolation(size, self.enlarge) for size in video.shape[2:4])
            video = np.einsum("yh,xw,bfhwc->bfyxc", down, across, video, optimize=True)
        return np.clip(video / 2 + 0.5, 0.0, 1.0)

    def fold(self, video: Any) -> np.ndarray:
        """Video in [0, 1] -> latents in [-1, 1], float32: the inverse of `decode`, where `enlarge` is 1.

        Otherwise blocks of `enlarge` x `enlarge` pixels are averaged first. Raises `UserError` when height or width is
        not a multiple of `factor` times `enlarge`, or the number of frames not one of `frame_factor`.
        """
        video, block = np.asarray(video, np.float32), self.factor * self.enlarge
        self._check_channels(video, 3)
        if video.shape[-3] % block or video.shape[-2] % block:
            raise UserError(
                f"a video of {video.shape[-3]} x {video.shape[-2]} pixels cannot be folded",
                remedy=f"make height and width multiples of {block}",
            )
        if video.shape[1] % self.frame_factor:
            raise UserError(
                f"a video of {video.shape[1]} frames cannot be folded",
                remedy=f"make its frames a multiple of {self.frame_factor}",
            )
        video = reduce(video, "b f (h n) (w m) c -> b f h w c", "mean", n=self.enlarge, m=self.enlarge)
        sizes = {"t": self.frame_factor, "p": self.factor, "q": self.factor}
        return rearrange(2 * video - 1, "b (f t) (h p) (w q) c -> b f h w (t p q c)", **sizes)

    def _check_channels(self, array: np.ndarray, channels: int):
        if array.ndim != 5 or array.shape[-1] != channels:
            raise UserError(
                f"an array of shape {array.shape} is not (batch, frames, height, width, {channels})",
                remedy="give it these five axes",
            )


def side_files(folder: str | os.PathLike) -> dict[str, Path]:
    """What says how a folder is sampled, by file name, as `models.save` takes it along.

    The pipeline's files, or a published model's scheduler where there is no pipeline, or nothing. Raises
    `UserError` if a pipeline is corrupt.
    """
    path = Path(folder) / FILE
    if not path.exists():
        scheduler = scheduler_file(folder)
        return {} if scheduler is None else {SCHEDULER: scheduler}
    Pipeline.load(folder)
    table = read_json(path)["context"]["file"]
    return {FILE: path, table: path.parent / table}


def copy_pipeline(source: str | os.PathLike, target: str | os.PathLike) -> bool:
    """Copy `pipeline.json` and the word table into another folder, as a derived model needs them.

    Returns whether there was something to copy. Raises `UserError` if they are corrupt or cannot be written.
    """
    if not (Path(source) / FILE).exists():
        return False
    Pipeline.load(source).save(target)
    return True


def _interpolation(size: int, times: int) -> np.ndarray:
    """Weights [size * times, size] of linear interpolation between pixel centres; edges are continued."""
    centers = np.clip((np.arange(size * times) + 0.5) / times - 0.5, 0, size - 1)
    columns = [np.interp(centers, np.arange(size), unit) for unit in np.eye(size)]
    return np.stack(columns, axis=1).astype(np.float32)  # size x [size * times] -> [size * times, size]


def _read_word_table(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """The words and their vectors, float32 (words, dim)."""
    table = SafetensorsFile(path)
    embeddings = table.read("embeddings").astype(np.float32)
    try:
        words = json.loads(table.metadata["words"])
    except (KeyError, ValueError):
        words = None
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise UserError(f"{path} has no list of words in its header", remedy="restore the file")
    if not np.isfinite(embeddings).all():
        raise UserError(f"{path} holds NaN or infinite embeddings", remedy="restore the file")
    return tuple(words), embeddings


_KINDS = {str: "a string", int: "a whole number", float: "a finite number", dict: "an object"}


class _Fields:
    """A JSON object that must hold certain fields and no others."""

    def __init__(self, path: Path, values: dict, name: str = ""):
        self.path, self.name, self.left = path, name, dict(values)

    def take(self, key: str, kind: type):
        """The field's value, which must be there and of that type; an int is a float too."""
        if key not in self.left:
            raise UserError(f"{self.path} lacks {self.name + key!r}", remedy="add it, or restore the file")
        value = self.left.pop(key)
        number = (int, float) if kind is float else kind
        good = isinstance(value, number) and not isinstance(value, bool)
        # JSON as Python reads it has NaN and Infinity.
        if not good or (kind is float and not math.isfinite(value)):
            raise UserError(f"{self.path}: {self.name + key!r} is {value!r}", remedy=f"it must be {_KINDS[kind]}")
        return kind(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least one."""
        if default is not None and key not in self.left:
            return default
        value = self.take(key, int)
        if value < 1:
            raise UserError(f"{self.path}: {self.name + key!r} is {value}", remedy="it must be at least 1")
        return value

    def expect(self, key: str, known: str) -> None:
        """A field that has one known value so far."""
        value = self.take(key, str)
        if value != known:
            raise UserError(f"{self.path}: {self.name + key!r} is {value!r}", remedy=f"only {known!r} is known")

    def part(self, key: str) -> "_Fields":
        """The fields of an inner object."""
        return _Fields(self.path, self.take(key, dict), f"{self.name}{key}.")

    def rest(self) -> dict[str, Any]:
        """All fields that are left, whatever they are."""
        rest, self.left = self.left, {}
        return rest

    def check_used(self) -> None:
        """Raise unless every field was taken."""
        if self.left:
            names = [self.name + key for key in self.left]
            raise UserError(f"{self.path} has unknown fields", remedy="remove them", items=names)
