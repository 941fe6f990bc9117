"""AnimateDiff: the UNet of Stable Diffusion 1.5 with motion modules, v1, v2 and v3 (diffusers' UNetMotionModel).

Read in diffusers 0.42 `models/unets/unet_motion_model.py`, and for the other placement of group norms in
guoyww/AnimateDiff `animatediff/models/resnet.py`, `animatediff/models/motion_module.py`, `configs/inference/`.
"""

import functools

import jax
import jax.numpy as jnp

from models.unet_additions import check_references, check_residuals
from models.unet_blocks import Parts, ResnetBlock
from models.unet_levels import Place, VideoUNet
from models.unet_motion_config import UNetMotionConfig, check_inputs
from models.unet_stream import UNetConditioning, UNetStream
from models.unet_transformers import SpatialTransformer, TemporalTransformer


class UNetMotionModel(VideoUNet):
    """The video UNet: in every layer a ResNet, a spatial transformer where the level has one, and a motion module."""

    def __init__(self, config: UNetMotionConfig, *, key: jax.Array, dtype=jnp.float32):
        options = {"groups": config.norm_num_groups, "epsilon": config.norm_eps, "key": key, "dtype": dtype}
        super().__init__(config, functools.partial(_parts, config), **options)
        self.joint_head = config.resnet_group_norm == "joint"

    def embed(
        self, latents, timestep, context, *, down_block_additional_residuals=None, mid_block_additional_residual=None,
        reference_states=None, reference_seen=None,
    ):  # fmt: skip
        """Latents (batch, frames, height, width, channels) -> the stream and its conditioning.

        Computation is in the type of the weights.

        Args:
            latents, timestep, context: See `VideoModel`; `context` is one text a video, (batch, tokens, text_dim).
            down_block_additional_residuals: What a ControlNet adds to the skip connections: one array (batch, frames,
                height, width, channels) each, in the order of the way down.
            mid_block_additional_residual: What it adds behind the middle, likewise.
            reference_states: As MagicAnimate's appearance encoder gives them: (batch, tokens, channels), what each
                self-attention of images in the middle and on the way up sees beside a frame's own tokens, in the order
                in which they run: what goes into its query, key and value in the other network.
            reference_seen: (batch,) bool, which videos see them; all by default. MagicAnimate's unconditional half
                does not.

        Raises:
            UserError: More frames than the motion modules have positions, a height or width that cannot be halved as
                often as the model does, other channels or another text width than the checkpoint's, timesteps a token,
                residuals or states of another number or shape.
        """
        check_inputs(self.config, latents.shape, jnp.shape(timestep), context.shape)
        check_residuals(self.config, latents.shape, down_block_additional_residuals, mid_block_additional_residual)
        seen = None if reference_seen is None else jnp.shape(reference_seen)
        check_references(self.config, latents.shape[0], reference_states, seen)
        embedding = self.time_embedding(timestep, self.dtype).astype(self.dtype)
        conditioning = UNetConditioning(embedding, context.astype(self.dtype), reference_seen=reference_seen)
        sample = self.first_sample(latents)
        stream = UNetStream(
            sample, (), tuple(down_block_additional_residuals or ()), mid_block_additional_residual,
            tuple(state.astype(self.dtype) for state in reference_states or ()),
        )  # fmt: skip
        return stream.opened(sample, sample), conditioning


def _parts(config: UNetMotionConfig, place: Place, *, key: jax.Array, dtype) -> Parts:
    """What a block does. In the middle, the motion module is there where the version has one."""
    keys, width, options = jax.random.split(key, 4), place.width, {"dtype": dtype}
    norms = {"groups": config.norm_num_groups, "epsilon": config.norm_eps}
    joint = config.resnet_group_norm == "joint"
    resnet = functools.partial(
        ResnetBlock, place.channels, width, config.time_dim, joint=joint, parts=place.parts, **norms, **options
    )
    spatial = functools.partial(
        SpatialTransformer, width, config.num_attention_heads, config.cross_attention_dim, config.norm_num_groups,
        linear=config.use_linear_projection, key=keys[1], **options,
    )  # fmt: skip
    motion = functools.partial(
        TemporalTransformer, width, width, config.motion_num_attention_heads, config.norm_num_groups,
        positions=config.motion_max_seq_length, joint=config.motion_group_norm == "joint", key=keys[2], **options,
    )  # fmt: skip
    number = place.number or "0"
    parts = [("resnets", number, resnet(key=keys[0]))]
    if place.attends:
        parts.append(("attentions", number, spatial()))
    if place.way != "middle" or config.use_motion_mid_block:
        parts.append(("motion_modules", number, motion()))
    if place.way == "middle":
        parts.append(("resnets", "1", resnet(key=keys[3])))
    return parts
