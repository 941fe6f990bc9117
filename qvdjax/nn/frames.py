"""Ranges of their own for the frames of a video: where frames lie in a layer's input, and which range is whose."""

from typing import Literal

import jax
import numpy as np

FrameAxis = Literal[0, 1]
"""The axis of a layer's input that frames lie on: 0 as (batch frames), 1 as (frames positions)."""


def by_frame(x: jax.Array, axis: FrameAxis, frames: int) -> jax.Array:
    """An input [..., channels] -> [batch, frames, values]."""
    batch = x.shape[0] // frames if axis == 0 else x.shape[0]
    return x.reshape(batch, frames, -1)  # (b f) ... c or b (f p) ... c -> b f (p ... c)


def for_input(values: jax.Array, axis: FrameAxis, shape: tuple[int, ...]) -> jax.Array:
    """One number a frame, spread over an input.

    The samples of a batch share them. An input of another number of frames gets some of them, of no meaning:
    `VideoModel.run` refuses such a call, and what only asks for shapes or for the layers of the timestep may go on.

    Args:
        values: [frames, 1].
        axis: See `FrameAxis`.
        shape: Of the input.

    Returns:
        [(batch frames), 1, ...] or [1, (frames positions), 1, ...], with as many axes as the input.
    """
    frames, size = len(values), shape[axis]
    rows = np.arange(size) % frames if axis == 0 else np.arange(size) * frames // size
    return values[rows].reshape(*(1,) * axis, size, *(1,) * (len(shape) - axis - 1))  # rows 1 -> (1) rows 1 ...
