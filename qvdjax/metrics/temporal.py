"""How a video changes from frame to frame. Neither measure needs a reference or a network."""

import numpy as np
from numpy.typing import ArrayLike


def flicker(video: ArrayLike) -> np.ndarray:
    """VBench's temporal flickering score: (255 - mean absolute difference of adjacent frames) / 255.

    Source: Vchitect/VBench, `vbench/temporal_flickering.py`: frames are 8-bit, the difference is averaged
    over pixels and channels, then over the pairs of frames. VBench reads the frames from mp4 files,
    whose compression smooths them a little; here they are the decoded frames themselves. Higher is
    steadier, and a still picture scores 1, so read it beside a measure of motion.

    Args:
        video: (..., frames, height, width, channels), values in [0, 1], rounded to 8 bits here.

    Returns:
        float64 (...): one score a video, in [0, 1].

    Raises:
        ValueError: fewer than two frames.
    """
    pixels = np.clip(np.round(_adjacent(video) * 255.0), 0, 255)
    difference = np.abs(np.diff(pixels, axis=-4))
    return (255.0 - np.mean(difference, axis=(-4, -3, -2, -1))) / 255.0


def frame_difference_energy(video: ArrayLike) -> np.ndarray:
    """Mean squared difference of adjacent frames: how much moves, or flickers.

    The ratio of a candidate's energy to its reference's is the useful figure: below 1 the motion was
    damped, above it noise or flicker was added.

    Args:
        video: (..., frames, height, width, channels), values in [0, 1].

    Returns:
        float64 (...): one value a video, in [0, 1].

    Raises:
        ValueError: fewer than two frames.
    """
    return np.mean(np.square(np.diff(_adjacent(video), axis=-4)), axis=(-4, -3, -2, -1))


def _adjacent(video: ArrayLike) -> np.ndarray:
    video = np.asarray(video, np.float64)
    if video.ndim < 4 or video.shape[-4] < 2:
        raise ValueError(f"at least two frames (..., frames, height, width, channels) are needed, got {video.shape}")
    return video
