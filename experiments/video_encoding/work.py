"""What is done so far, in a folder that several processes share: the texts and latents of clips, and what failed.

    OUT.work/settings.json                 what the run was begun with; another one is refused
             texts/<hash>.safetensors      `context` of one caption
             clips/<hash>.safetensors      `latents` of one clip; its version stands in the header
             clips/<hash>.json             why a clip could not be encoded; its version
             *.lock                        held (flock) by the process that is at it, and free again when that ends

Every file appears complete or not at all, so a process may be killed at any time.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.video_encoding.clips import ClipFile
from qvdjax.checkpoint import SafetensorsFile, TensorSource, read_json, write_file
from qvdjax.checkpoint.atomic import disk_errors, new_file
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Work:
    """The folder."""

    path: Path

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any]) -> "Work":
        """Begin or go on.

        Raises:
            UserError: It was begun with other settings, or cannot be written.
        """
        work, file = cls(path), path / "settings.json"
        with disk_errors(path):
            for name in ("texts", "clips"):
                (path / name).mkdir(parents=True, exist_ok=True)
        with work.held("settings", wait=True):
            if not file.exists():
                _write_json(file, settings)
        begun = read_json(file)
        if other := [name for name, value in settings.items() if begun.get(name) != value]:
            raise UserError(
                f"{path} was begun with other settings",
                remedy="repeat them, or delete it to begin anew",
                items=[f"{name} {begun.get(name)!r}" for name in other],
            )
        return work

    @contextlib.contextmanager
    def held(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Whether this process is the only one at something; others that wait come after it."""
        with disk_errors(self.path):
            file = (self.path / f"{name}.lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
                return
            yield True

    def text_file(self, caption: str) -> Path:
        """Where a caption's embedding is, or will be."""
        return self.path / "texts" / f"{_hashed(caption)}.safetensors"

    def save_text(self, caption: str, context: np.ndarray, cut: int) -> None:
        """Keep the embedding (tokens, dim) of a caption, and how many of its tokens were too many."""
        _write_tensor(self.text_file(caption), "context", context, {"cut": str(cut)})

    def text(self, caption: str) -> np.ndarray:
        """The embedding that `save_text` kept."""
        return SafetensorsFile(self.text_file(caption)).read("context")

    def cut(self, caption: str) -> int:
        """How many of its tokens were too many."""
        return int(SafetensorsFile(self.text_file(caption)).metadata["cut"])

    def claim(self, clip: ClipFile) -> contextlib.AbstractContextManager[bool]:
        """Whether this process may encode a clip now, while no other does."""
        return self.held(f"clips/{_hashed(clip.name)}")

    def save_latents(self, clip: ClipFile, latents: np.ndarray) -> None:
        """Keep the latents (frames, height, width, channels) of a clip."""
        self._failure_file(clip).unlink(missing_ok=True)
        _write_tensor(self._latents_file(clip), "latents", latents, {"version": clip.version()})

    def save_failure(self, clip: ClipFile, error: UserError) -> None:
        """Keep why a clip cannot be encoded; it is tried again when its file or its caption has changed."""
        _write_json(self._failure_file(clip), {"version": _version(clip), "error": str(error)})

    def latents(self, clip: ClipFile) -> np.ndarray | None:
        """What `save_latents` kept of the clip as it is now, or None."""
        file = self._latents_file(clip)
        if not file.is_file():
            return None
        opened = SafetensorsFile(file)
        return opened.read("latents") if opened.metadata.get("version") == clip.version() else None

    def is_done(self, clip: ClipFile) -> bool:
        """Whether its latents are there; they are not read."""
        file = self._latents_file(clip)
        return file.is_file() and SafetensorsFile(file).metadata.get("version") == clip.version()

    def failure(self, clip: ClipFile) -> str | None:
        """Why the clip as it is now cannot be encoded, or None."""
        file = self._failure_file(clip)
        if not file.is_file():
            return None
        kept = read_json(file)
        return kept["error"] if kept.get("version") == _version(clip) else None

    def _latents_file(self, clip: ClipFile) -> Path:
        return self.path / "clips" / f"{_hashed(clip.name)}.safetensors"

    def _failure_file(self, clip: ClipFile) -> Path:
        return self.path / "clips" / f"{_hashed(clip.name)}.json"


def _hashed(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _version(clip: ClipFile) -> str:
    """That of a clip that failed: its caption may be what is mended."""
    caption = clip.caption_file.stat().st_mtime_ns if clip.listed is None and clip.caption_file.is_file() else None
    return f"{clip.version()} {clip.listed} {caption}"


def _write_tensor(file: Path, name: str, values: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    write_file(file, [TensorSource(name, values.shape, values.dtype, lambda: values)], metadata)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    with new_file(file) as temporary:
        temporary.write_text(json.dumps(dict(content), indent=1) + "\n", encoding="utf-8")
