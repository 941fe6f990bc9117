"""From the levels of a video UNet to its blocks, and what every such model has before and behind them."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
from flax import nnx

from models.blocks import TimestepEmbedding
from models.unet_blocks import ONE_AROUND, DownBlock, MidBlock, Parts, UpBlock
from models.unet_config import UNetConfig
from models.unet_stream import normalised, per_frame
from qvdjax.nn import Conv, GroupNorm, Stack, VideoModel
from qvdjax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a block stands.

    Attributes:
        way: "down", "middle" or "up".
        level: Of resolution, 0 for the highest.
        number: Of the layer in its level, as diffusers' names have it; "" in the middle, where parts have their own.
        channels, width: Channels that come in and go out.
        attends: Whether the level attends to the text.
        parts: On the way up, channels of the sample and of the skip connection that come in, else None.
    """

    way: Literal["down", "middle", "up"]
    level: int
    number: str
    channels: int
    width: int
    attends: bool
    parts: tuple[int, ...] | None = None


PartsOf = Callable[..., Parts]
"""(place, *, key, dtype) -> what a block of that place does, in order."""


class VideoUNet(VideoModel):
    """First convolution, time embedding, blocks, norm and last convolution.

    Every layer of every level is a block of its own kind (`models.unet_blocks`). A subclass writes `embed`.
    """

    joint_head = False  # whether the last norm takes mean and variance over all frames

    def __init__(
        self, config: UNetConfig, parts_of: PartsOf, *, groups: int, epsilon: float, first: tuple[Stack, ...] = (),
        key: jax.Array, dtype,
    ):  # fmt: skip
        """`groups` and `epsilon` are of the last norm; `first` stands before the blocks of the levels."""
        keys = jax.random.split(key, 4)
        self.config = config
        width = config.block_out_channels[0]
        self.conv_in = Conv(
            config.in_channels, width, (3, 3), padding=ONE_AROUND, role="embedder", axes=("embed", None),
            frame_axis=0, key=keys[0], dtype=dtype,
        )  # fmt: skip
        self.time_embedding = TimestepEmbedding(width, config.time_dim, key=keys[1], dtype=dtype)
        self.stacks = nnx.List([*first, *_stacks(config, parts_of, keys[2], dtype)])
        self.conv_norm_out = GroupNorm(width, groups, epsilon=epsilon, dtype=dtype)
        self.conv_out = Conv(
            width, config.out_channels, (3, 3), padding=ONE_AROUND, role="head", axes=(None, "embed"),
            frame_axis=0, key=keys[3], dtype=dtype,
        )  # fmt: skip

    @property
    def dtype(self):
        """Type that is computed in: a bias stays float when its layer is quantized."""
        return self.conv_out.bias[...].dtype

    def first_sample(self, latents: jax.Array) -> jax.Array:
        """Latents (batch, frames, height, width, channels) -> the sample, of the first level's width."""
        return per_frame(self.conv_in, constrain(latents.astype(self.dtype), "batch", None, None, None, None))

    def head(self, stream, conditioning):
        """The stream -> latents (batch, frames, height, width, out_channels)."""
        return per_frame(self.conv_out, normalised(self.conv_norm_out, stream.sample, joint=self.joint_head))


def _stacks(config: UNetConfig, parts_of: PartsOf, key: jax.Array, dtype) -> list[Stack]:
    """The blocks down, in the middle, up; each is alone in its stack, since no two neighbours are of one kind."""
    down, middle, up = jax.random.split(key, 3)
    last, widths = config.levels - 1, config.block_out_channels
    stacks, skips = [], [widths[0]]  # channels of the open skip connections
    for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
        for number in range(config.layers_per_block):
            ends = number == config.layers_per_block - 1 and level < last
            place = Place("down", level, str(number), skips[-1], width, kind.startswith("CrossAttn"))
            inside, behind = jax.random.split(_fold(down, level, number))
            parts = parts_of(place, key=inside, dtype=dtype)
            block = DownBlock(parts, width, resamples=ends, key=behind, dtype=dtype)
            stacks.append(Stack(block, prefix=f"down_blocks.{level}"))
            skips += [width] * (1 + ends)
    place = Place("middle", last, "", widths[-1], widths[-1], attends=True)
    stacks.append(Stack(MidBlock(parts_of(place, key=middle, dtype=dtype)), prefix="mid_block"))
    before = widths[-1]
    for step, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types, strict=True)):
        for number in range(config.layers_per_block + 1):
            ends = number == config.layers_per_block and step < last
            both = (before, skips.pop())
            place = Place("up", last - step, str(number), sum(both), width, kind.startswith("CrossAttn"), both)
            inside, behind = jax.random.split(_fold(up, step, number))
            parts = parts_of(place, key=inside, dtype=dtype)
            block = UpBlock(parts, width, resamples=ends, key=behind, dtype=dtype)
            stacks.append(Stack(block, prefix=f"up_blocks.{step}"))
            before = width
    return stacks


def _fold(key: jax.Array, level: int, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, level), number)
