"""Causal convolutions over a video that comes in chunks of frames: what they remember of the chunks before.

A causal convolution looks at a frame and those before it. Given a whole video it needs nothing else; given chunks it
needs the last frames of the chunk before, which `History` keeps. It is the carry of a loop over chunks, so that
decoding a video takes the memory of a chunk. diffusers calls it `feat_cache` (Wan) and `conv_cache` (CogVideoX).
"""

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange

from qvdjax.nn import Conv

Start = Literal["zeros", "first", "nothing"]


class History:
    """The last frames that each causal layer of a network has seen.

    Layers are told apart by the order in which they ask, so all of them ask in every chunk.

    Attributes:
        begins: Whether this is the first chunk of a video.
        kept: For the next chunk: one (batch, frames, height, width, channels) a layer that has asked.
    """

    def __init__(self, before: Sequence[jax.Array] | None = None):
        """`before` is `kept` of the chunk before; None begins a video."""
        self.begins = before is None
        self._before = None if before is None else iter(before)
        self.kept: tuple[jax.Array, ...] = ()

    def prepend(self, x: jax.Array, frames: int, start: Start = "zeros") -> jax.Array:
        """x (batch, frames', height, width, channels) behind the `frames` frames before it: frames + frames' in all.

        At the beginning of a video `start` stands there: "zeros", copies of the "first" frame, or "nothing", so that
        the result is shorter.
        """
        if not self.begins:
            earlier = next(self._before)
        elif start == "zeros":
            earlier = jnp.zeros_like(x, shape=(x.shape[0], frames, *x.shape[2:]))
        else:
            earlier = jnp.repeat(x[:, :1], frames if start == "first" else 0, axis=1)
        joined = jnp.concatenate([earlier, x], axis=1)  # b frames + frames' h w c
        self.kept = (*self.kept, joined[:, joined.shape[1] - frames :])
        return joined


def causal(conv: Conv, x: jax.Array, history: History, start: Start = "zeros") -> jax.Array:
    """A convolution over frames, rows and columns that sees no later frame: (batch, frames, ...) -> as many frames."""
    return conv(history.prepend(x, conv.kernel[0] - 1, start))


def in_chunks(run: Callable[[jax.Array, History], jax.Array], x: jax.Array, first: int, length: int) -> jax.Array:
    """Apply a causal network to `first` frames and then, in a scan, to `length` at a time.

    Args:
        run: (chunk, history) -> its part of the result, (batch, frames'', ...).
        x: (batch, first + n * length frames, height, width, channels).
        first, length: Frames of the first chunk and of the others.

    Returns:
        The parts one after the other, (batch, frames'', height', width', channels').
    """
    history = History()
    head = run(x[:, :first], history)
    if x.shape[1] == first:
        return head

    def step(before, chunk):
        history = History(before)
        part = run(chunk, history)
        return history.kept, part

    chunks = rearrange(x[:, first:], "b (n f) h w c -> n b f h w c", f=length)
    _, parts = jax.lax.scan(step, history.kept, chunks)
    return jnp.concatenate([head, rearrange(parts, "n b f h w c -> b (n f) h w c")], axis=1)
