"""The job of `qvdjax compare`: videos beside each other in one file, each below its label."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qvdjax.errors import UserError
from qvdjax.video import read_mp4, side_by_side, write_mp4


def compare_videos(
    videos: Sequence[Path], output: Path, *, labels: Sequence[str] = (), columns: int | None = None,
    fps: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write one video of several.

    Args:
        videos: At least two, of one size and number of frames.
        output: FILE.mp4, replaced if it is there already.
        labels: One a video; the files' names without their ends by default.
        columns: Videos in a row; all by default.
        fps: Frames a second; the first video's by default.

    Returns:
        {file, labels, frames, height, width, fps}.

    Raises:
        UserError: Fewer than two videos, other labels than videos, a video that cannot be read or has another shape, an
            output that is no mp4 or cannot be written.
    """
    if len(videos) < 2:
        raise UserError("one video alone cannot be compared", remedy="name two or more")
    if labels and len(labels) != len(videos):
        raise UserError(f"{len(videos)} videos with {len(labels)} labels", remedy="give one --label for each video")
    if columns is not None and columns < 1:
        raise UserError(f"{columns} videos in a row", remedy="give at least 1")
    if output.suffix != ".mp4":
        raise UserError(f"{output} is not .mp4", remedy="name a file ending in .mp4")
    labels = list(labels) or [video.stem for video in videos]
    clips = [read_mp4(video) for video in videos]
    shapes = {clip.frames.shape for clip in clips}
    if len(shapes) > 1:
        said = [
            f"{video} ({clip.frames.shape[0]} frames of {clip.frames.shape[1]} x {clip.frames.shape[2]})"
            for video, clip in zip(videos, clips, strict=True)
        ]
        raise UserError("the videos have different shapes", remedy="sample them with the same sizes", items=said)
    rate = clips[0].fps if fps is None else fps
    whole = side_by_side([clip.frames for clip in clips], labels, columns=columns)
    write_mp4(output, whole, fps=rate)
    frames, height, width = whole.shape[:3]
    return {"file": str(output), "labels": labels, "frames": frames, "height": height, "width": width, "fps": rate}
