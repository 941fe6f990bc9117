"""What the blocks of every video UNet change and read, and how layers of images see a video."""

import dataclasses
import functools

import jax
from einops import rearrange

from qvdjax.nn import GroupNorm


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sample", "skips"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UNetStream:
    """What the blocks change.

    Attributes:
        sample: (batch, frames, height, width, channels), at the resolution of the last block.
        skips: Like it, of the way down, those that the way up has not read yet; the last is read first.
    """

    sample: jax.Array
    skips: tuple[jax.Array, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["time_embedding", "context"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UNetConditioning:
    """What the blocks read.

    Attributes:
        time_embedding: (batch, time_dim); each ResNet block applies its own SiLU to it.
        context: (batch, text tokens, text_dim), the same text for all frames of a video.
    """

    time_embedding: jax.Array
    context: jax.Array


def per_frame(layer, x: jax.Array) -> jax.Array:
    """Apply a layer of images to every frame: (batch, frames, height, width, in) -> (..., height', width', out)."""
    y = layer(rearrange(x, "b f h w c -> (b f) h w c"))
    return rearrange(y, "(b f) h w c -> b f h w c", b=x.shape[0])


def normalised(norm: GroupNorm, x: jax.Array, *, joint: bool) -> jax.Array:
    """SiLU of the group norm of x (batch, frames, height, width, channels), over all frames or each on its own."""
    return jax.nn.silu(norm(x) if joint else per_frame(norm, x)).astype(x.dtype)
