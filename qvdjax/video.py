"""Videos as mp4 files (H.264, yuv420p, which every browser plays), and several side by side in one picture.

For looking, not for measuring: yuv420p halves the colour resolution, which costs more than quantization.
"""

import contextlib
import fractions
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange, repeat

from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError


class Clip(NamedTuple):
    """A decoded video: `frames` uint8 (frames, height, width, 3) and the frame rate in 1/s."""

    frames: np.ndarray
    fps: float


def to_uint8(video: np.ndarray) -> np.ndarray:
    """RGB (frames, height, width, 3), uint8 or floating in [0, 1] (what lies outside is clipped) -> uint8.

    Raises `UserError` for another shape or type, no frame, and NaN.
    """
    video = np.asarray(video)
    if video.ndim != 4 or video.shape[-1] != 3 or 0 in video.shape:
        raise UserError(f"a video of shape {video.shape} cannot be shown", remedy="give it (frames, height, width, 3)")
    if video.dtype == np.uint8:
        return video
    if not np.issubdtype(video.dtype, np.floating):
        raise UserError(f"a video of type {video.dtype} cannot be shown", remedy="give uint8, or float in [0, 1]")
    if np.isnan(video).any():
        raise UserError("the video holds NaN", remedy="find the layer that produced it")
    return np.rint(np.clip(video, 0, 1) * 255).astype(np.uint8)


def enlarge(video: np.ndarray, scale: int) -> np.ndarray:
    """Every pixel becomes a block of scale x scale pixels. Raises `UserError` for a scale below 1."""
    if scale < 1:
        raise UserError(f"the video's scale is {scale}", remedy="give a whole number of at least 1")
    return repeat(video, "f h w c -> f (h p) (w q) c", p=scale, q=scale)


def write_mp4(path: str | os.PathLike, video: np.ndarray, *, fps: float, scale: int = 1, quality: int = 12) -> None:
    """Write a video; the file appears under its name when it is complete, and replaces one that was there.

    H.264 with yuv420p needs even sizes: an odd height or width is made even by repeating the last row or
    column.

    Args:
        path: The mp4 file; its folder must exist.
        video: RGB (frames, height, width, 3), uint8 or float in [0, 1].
        fps: Frames a second.
        scale: Enlarge by this whole factor with hard edges, so that a tiny clip can be watched.
        quality: x264's constant rate factor, 0 (best) to 51.

    Raises:
        UserError: As `to_uint8` and `enlarge`; the frame rate is not positive; the folder is missing or not
            writable; the disk is full.
    """
    import av

    path = Path(path)
    frames = enlarge(to_uint8(video), scale)
    if not (math.isfinite(fps) and fps > 0):
        raise UserError(f"the frame rate is {fps}", remedy="give a positive number of frames a second")
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    if not path.parent.is_dir():
        raise UserError(f"the folder {path.parent} does not exist", remedy="make it, or choose another target")
    if path.is_dir():
        raise UserError(f"{path} is a folder", remedy="name a file, such as out.mp4")
    with _complete(path) as temporary, av.open(temporary, "w", format="mp4") as container:
        rate = fractions.Fraction(fps).limit_denominator(1000)
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(quality)})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())  # what the encoder still holds


def read_mp4(path: str | os.PathLike) -> Clip:
    """Read all frames of a video file.

    Raises:
        UserError: The file is missing, is no video, or is damaged.
    """
    import av

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file", remedy="check the path")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video", remedy="name an mp4 file")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            announced, fps = stream.frames, float(stream.average_rate or 0)
    except (av.error.FFmpegError, OSError) as error:
        raise UserError(f"{path} cannot be read as a video: {error.strerror}", remedy="make it again") from error
    # A damaged stream may decode without complaint up to where it breaks off.
    if not frames or len(frames) < announced:
        raise UserError(f"{path} holds {len(frames)} of {announced} frames", remedy="make it again")
    return Clip(np.stack(frames), fps)


def side_by_side(
    videos: Sequence[np.ndarray], labels: Sequence[str], *, scale: int = 1, columns: int | None = None
) -> np.ndarray:
    """Several videos of one shape in one picture, each below its label.

    Args:
        videos: RGB (frames, height, width, 3) each, uint8 or float in [0, 1].
        labels: One a video; cut where it does not fit.
        scale: Enlarge the videos (not the labels) by this whole factor.
        columns: Videos in a row; all in one by default. Empty places stay dark.

    Returns:
        uint8 (frames, height, width, 3). Raises `UserError` for none, for differing shapes or numbers.
    """
    if not videos or len(videos) != len(labels):
        raise UserError(
            f"{len(videos)} videos with {len(labels)} labels", remedy="give at least one, and one label each"
        )
    panels = [enlarge(to_uint8(video), scale) for video in videos]
    if len({panel.shape for panel in panels}) > 1:
        shapes = [str(np.shape(video)) for video in videos]
        raise UserError("the videos have different shapes", remedy="give clips of one shape", items=shapes)
    frames, _, width, _ = panels[0].shape
    panels = [
        np.concatenate([repeat(_label(label, width), "h w c -> f h w c", f=frames), panel], axis=1)
        for label, panel in zip(labels, panels, strict=True)
    ]
    gap = ((0, 0), (0, _GAP), (0, _GAP), (0, 0))
    panels = [np.pad(panel, gap, constant_values=_DARK) for panel in panels]
    columns = min(columns or len(panels), len(panels))
    panels += [np.full_like(panels[0], _DARK)] * (-len(panels) % columns)
    return rearrange(np.stack(panels), "(r s) f h w c -> f (r h) (s w) c", s=columns)[:, :-_GAP, :-_GAP]


_GAP, _DARK, _TEXT_SIZE = 4, 24, 13  # pixels, grey level, pixels


def _label(text: str, width: int) -> np.ndarray:
    """A strip with a line of text, uint8 (height, width, 3)."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=_TEXT_SIZE)
    while len(text) > 1 and font.getlength(text) > width - 4:
        text = text.removesuffix("…")[:-1] + "…"
    image = Image.new("RGB", (width, _TEXT_SIZE + 6), (_DARK,) * 3)
    ImageDraw.Draw(image).text((2, 2), text, fill=(240, 240, 240), font=font)
    return np.asarray(image)


def write_png(path: Path, picture: np.ndarray, *, scale: int = 1) -> None:
    """Write a picture, (height, width, 3) in [0, 1], each side `scale` times as long. Raises `UserError` if the file
    cannot be written."""
    from PIL import Image

    pixels = enlarge(to_uint8(picture[None]), scale)[0]  # h w c -> 1 h w c -> (h s) (w s) c
    with new_file(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")


@contextlib.contextmanager
def _complete(path: Path) -> Iterator[str]:
    """`new_file` with the encoder's errors explained."""
    import av

    try:
        with new_file(path) as temporary:
            yield str(temporary)
    except av.error.FFmpegError as error:
        raise UserError(f"{path} cannot be encoded: {error.strerror}", remedy="try another size or scale") from error
