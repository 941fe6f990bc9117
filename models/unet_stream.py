"""What the blocks of every video UNet change and read, and how layers of images see a video."""

import dataclasses
import functools

import jax
from einops import rearrange

from qvdjax.nn import GroupNorm


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["sample", "skips", "residuals", "middle", "references"],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class UNetStream:
    """What the blocks change.

    Attributes:
        sample: (batch, frames, height, width, channels), at the resolution of the last block.
        skips: Like it, of the way down, those that the way up has not read yet; the last is read first.
        residuals: What a ControlNet adds to the skip connections that are still to be opened, in order; () without one.
        middle: What it adds to the sample in the middle, or None.
        references: (batch, tokens, channels) each, tokens of a reference image for the blocks in the middle and on the
            way up that attend and have not run yet, in order; () without one.
    """

    sample: jax.Array
    skips: tuple[jax.Array, ...]
    residuals: tuple[jax.Array, ...] = ()
    middle: jax.Array | None = None
    references: tuple[jax.Array, ...] = ()

    def opened(self, sample: jax.Array, *skips: jax.Array) -> "UNetStream":
        """With another sample, and with further skip connections, to which their residuals are added."""
        if self.residuals:
            skips = tuple(skip + more.astype(skip.dtype) for skip, more in zip(skips, self.residuals))
        rest = self.residuals[len(skips) :]
        return dataclasses.replace(self, sample=sample, skips=(*self.skips, *skips), residuals=rest)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["time_embedding", "context", "reference", "reference_seen"],
    meta_fields=[],
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class UNetConditioning:
    """What the blocks read.

    Attributes:
        time_embedding: (batch, time_dim); each ResNet block applies its own SiLU to it.
        context: (batch, text tokens, text_dim), the same text for all frames of a video.
        reference: (batch, tokens, channels), what the images' self-attention of one block sees beside a frame's own
            tokens, the same for all frames; None where it sees nothing else.
        reference_seen: (batch,) bool, which videos do see it; None: all.
    """

    time_embedding: jax.Array
    context: jax.Array
    reference: jax.Array | None = None
    reference_seen: jax.Array | None = None


def per_frame(layer, x: jax.Array) -> jax.Array:
    """Apply a layer of images to every frame: (batch, frames, height, width, in) -> (..., height', width', out)."""
    y = layer(rearrange(x, "b f h w c -> (b f) h w c"))
    return rearrange(y, "(b f) h w c -> b f h w c", b=x.shape[0])


def normalised(norm: GroupNorm, x: jax.Array, *, joint: bool) -> jax.Array:
    """SiLU of the group norm of x (batch, frames, height, width, channels), over all frames or each on its own."""
    return jax.nn.silu(norm(x) if joint else per_frame(norm, x)).astype(x.dtype)
