"""A folder of clips and captions, and clips as frames of one size and rate."""

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qvdjax.checkpoint.folder import read_json
from qvdjax.errors import UserError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
CAPTIONS = "captions.json"


@dataclasses.dataclass(frozen=True)
class ClipFile:
    """One clip of a folder.

    Attributes:
        name: Its path within the folder.
        path: Its file.
        caption_file: Where its caption stands if `captions.json` has none.
        listed: Its caption there.
    """

    name: str
    path: Path
    caption_file: Path
    listed: str | None

    def caption(self) -> str:
        """What it shows. Raises `UserError` where nothing says it, or nothing that is a text."""
        text = self.listed
        if text is None:
            try:
                text = self.caption_file.read_text(encoding="utf-8-sig")
            except FileNotFoundError:
                raise UserError(
                    f"{self.path} has no caption", remedy=f"write {self.caption_file.name}, or an entry of {CAPTIONS}"
                ) from None
            except (UnicodeDecodeError, OSError) as error:
                raise UserError(
                    f"the caption {self.caption_file} cannot be read as UTF-8 ({error})", remedy="write it again"
                ) from None
        text = " ".join(text.split())
        if not text:
            raise UserError(f"the caption of {self.path} is empty", remedy="say what it shows")
        return text

    def version(self) -> str:
        """What changes when its file does."""
        status = self.path.stat()
        return f"{status.st_size} {status.st_mtime_ns}"


def find_clips(folder: Path) -> tuple[ClipFile, ...]:
    """All clips of a folder and of those in it, by name.

    The caption of `a/b.mp4` stands in `a/b.txt`, or in `captions.json` of the folder: {"a/b.mp4": "..."}.

    Raises:
        UserError: No such folder, no clip in it, or `captions.json` is damaged or names clips that are not there.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder", remedy="name a folder of clips")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise UserError(f"{folder} holds no clip", remedy=f"put files there that end in {', '.join(SUFFIXES)}")
    listed: dict[str, Any] = read_json(folder / CAPTIONS) if (folder / CAPTIONS).is_file() else {}
    if wrong := [name for name, text in listed.items() if not isinstance(text, str)]:
        raise UserError(f"{folder / CAPTIONS} has captions that are no strings", remedy="mend them", items=wrong)
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    if strangers := sorted(set(listed) - set(names)):
        raise UserError(
            f"{folder / CAPTIONS} names clips that are not there", remedy="copy them, or take their entries out",
            items=strangers,
        )  # fmt: skip
    return tuple(ClipFile(name, path, path.with_suffix(".txt"), listed.get(name)) for name, path in names.items())


def read_frames(path: Path, size: tuple[int, int, int], fps: float | None) -> np.ndarray:
    """The first frames of a clip.

    Of another size it is shrunk or enlarged until it covers the frame, and what stands out at two sides is cut off, as
    much at the one as at the other. Of a higher rate the frames nearest in time are taken.

    Args:
        path: A video file.
        size: (frames, height, width).
        fps: Frames a second; None takes every frame of the clip.

    Returns:
        uint8 (frames, height, width, rgb).

    Raises:
        UserError: No video, a damaged one, too few frames, or a lower rate.
    """
    import av

    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video", remedy="take it away")
            stream = container.streams.video[0]
            wanted = _numbers(path, size[0], fps, float(stream.average_rate or 0))
            frames = list(_chosen(container.decode(stream), wanted, size[1:]))
    except (av.error.FFmpegError, OSError) as error:
        reason = error.strerror or error
        raise UserError(f"{path} cannot be read as a video: {reason}", remedy="make it again") from error
    if len(frames) < size[0]:
        lasts = "" if fps is None else f" at {fps:g} a second"
        raise UserError(
            f"{path} is too short: it gives {len(frames)} frames{lasts}, and {size[0]} are asked for",
            remedy="ask for fewer, or take it away",
        )
    return np.stack(frames)


def _numbers(path: Path, count: int, fps: float | None, rate: float) -> list[int]:
    """Which frames of a clip are taken, rising."""
    if fps is None:
        return list(range(count))
    if rate < fps * 0.999:  # 24000/1001 is 24
        raise UserError(
            f"{path} has {rate:g} frames a second, and {fps:g} are asked for",
            remedy="ask for fewer with --fps, or take every frame with --fps 0",
        )
    return [round(number * rate / fps) for number in range(count)]


def _chosen(decoded: Iterator[Any], wanted: list[int], size: tuple[int, int]) -> Iterator[np.ndarray]:
    left = iter(wanted)
    following = next(left)
    for number, frame in enumerate(decoded):
        if number == following:
            yield _fitted(frame, *size)
            following = next(left, None)
            if following is None:
                return


def _fitted(frame: Any, height: int, width: int) -> np.ndarray:
    """A decoded frame -> uint8 (height, width, rgb)."""
    times = max(height / frame.height, width / frame.width)
    tall, wide = (max(asked, math.ceil(side * times - 1e-6)) for asked, side in
                  ((height, frame.height), (width, frame.width)))  # fmt: skip
    # Of many pixels their mean: a filter of a fixed width would flicker.
    kind = "AREA" if times < 1 else "BICUBIC"
    pixels = frame.reformat(width=wide, height=tall, format="rgb24", interpolation=kind).to_ndarray()
    top, left = (tall - height) // 2, (wide - width) // 2
    return pixels[top : top + height, left : left + width]
