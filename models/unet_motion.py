"""AnimateDiff: the UNet of Stable Diffusion 1.5 with motion modules, v1, v2 and v3 (diffusers' UNetMotionModel).

Read in diffusers 0.42 `models/unets/unet_motion_model.py`, and for the other placement of group norms in
guoyww/AnimateDiff `animatediff/models/resnet.py`, `animatediff/models/motion_module.py`, `configs/inference/`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.blocks import TimestepEmbedding
from models.unet_blocks import ONE_AROUND, DownBlock, MidBlock, UNetConditioning, UNetStream, UpBlock, normalised
from models.unet_motion_config import UNetMotionConfig, check_inputs
from models.unet_transformers import per_frame
from qvdjax.nn import Conv, GroupNorm, Stack, VideoModel
from qvdjax.parallel.rules import constrain


class UNetMotionModel(VideoModel):
    """The video UNet. Every layer of every level is a block of its own kind (`models.unet_blocks`)."""

    def __init__(self, config: UNetMotionConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        self.config = config
        first = config.block_out_channels[0]
        self.conv_in = Conv(
            config.in_channels, first, (3, 3), padding=ONE_AROUND, role="embedder", axes=("embed", None), key=keys[0],
            dtype=dtype,
        )  # fmt: skip
        self.time_embedding = TimestepEmbedding(first, config.time_dim, key=keys[1], dtype=dtype)
        self.stacks = nnx.List(_stacks(config, keys[2], dtype))
        self.conv_norm_out = GroupNorm(first, config.norm_num_groups, epsilon=config.norm_eps, dtype=dtype)
        self.conv_out = Conv(
            first, config.out_channels, (3, 3), padding=ONE_AROUND, role="head", axes=(None, "embed"), key=keys[3],
            dtype=dtype,
        )  # fmt: skip

    def embed(self, latents, timestep, context):
        """Latents (batch, frames, height, width, channels) -> the stream and its conditioning.

        Computation is in the type of the weights. `context` is one text a video, (batch, tokens, text_dim).

        Raises:
            UserError: More frames than the motion modules have positions, a height or width that cannot be halved as
                often as the model does, other channels or another text width than the checkpoint's, timesteps a token.
        """
        check_inputs(self.config, latents.shape, jnp.shape(timestep), context.shape)
        dtype = self.conv_out.bias[...].dtype  # a bias stays float when its layer is quantized
        sample = per_frame(self.conv_in, constrain(latents.astype(dtype), "batch", None, None, None, None))
        embedding = self.time_embedding(timestep, dtype).astype(dtype)
        return UNetStream(sample, (sample,)), UNetConditioning(embedding, context.astype(dtype))

    def head(self, stream, conditioning):
        """The stream -> latents (batch, frames, height, width, out_channels)."""
        joint = self.config.resnet_group_norm == "joint"
        return per_frame(self.conv_out, normalised(self.conv_norm_out, stream.sample, joint=joint))


def _stacks(config: UNetMotionConfig, key: jax.Array, dtype) -> list[Stack]:
    """The blocks down, in the middle, up; each is alone in its stack, since no two neighbours are of one kind."""
    down, middle, up = jax.random.split(key, 3)
    last, widths, options = config.levels - 1, config.block_out_channels, {"dtype": dtype}
    stacks, skips = [], [widths[0]]  # channels of the open skip connections
    for level, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
        for number in range(config.layers_per_block):
            ends = number == config.layers_per_block - 1 and level < last
            block = DownBlock(
                config, number, skips[-1], width, attends=kind.startswith("CrossAttn"),
                resamples="downsamplers" if ends else None, key=_fold(down, level, number), **options,
            )  # fmt: skip
            stacks.append(Stack(block, prefix=f"down_blocks.{level}"))
            skips += [width] * (1 + ends)
    stacks.append(Stack(MidBlock(config, key=middle, **options), prefix="mid_block"))
    before = widths[-1]
    for level, (width, kind) in enumerate(zip(reversed(widths), config.up_block_types, strict=True)):
        for number in range(config.layers_per_block + 1):
            ends = number == config.layers_per_block and level < last
            block = UpBlock(
                config, number, before + skips.pop(), width, attends=kind.startswith("CrossAttn"),
                resamples="upsamplers" if ends else None, key=_fold(up, level, number), **options,
            )  # fmt: skip
            stacks.append(Stack(block, prefix=f"up_blocks.{level}"))
            before = width
    return stacks


def _fold(key: jax.Array, level: int, number: int) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, level), number)
