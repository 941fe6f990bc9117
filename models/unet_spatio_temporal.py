"""Stable Video Diffusion, image to video, of 14 frames and XT of 25 (diffusers' UNetSpatioTemporalConditionModel).

Read in diffusers 0.42 `models/unets/unet_spatio_temporal_condition.py`, `models/unets/unet_3d_blocks.py` and
`pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py`.
"""

import functools

import jax
import jax.numpy as jnp

from models.blocks import TimestepEmbedding
from models.inputs import join_image
from models.unet_blocks import Parts
from models.unet_levels import Place, VideoUNet
from models.unet_spatio_temporal_blocks import SpatioTemporalResnet, SpatioTemporalTransformer
from models.unet_spatio_temporal_config import GROUPS, UNetSpatioTemporalConfig, check_inputs
from models.unet_stream import UNetConditioning, UNetStream


class UNetSpatioTemporalConditionModel(VideoUNet):
    """The video UNet: in every layer a ResNet and where the level attends a transformer, each with a part over frames.

    ResNets see the time embedding and with it `added_time_ids`, so the layers of the timestep alone are those of its
    MLP.
    """

    timestep_roles = ("time",)

    def __init__(self, config: UNetSpatioTemporalConfig, *, key: jax.Array, dtype=jnp.float32):
        first, rest = jax.random.split(key)
        parts = functools.partial(_parts, config)
        super().__init__(config, parts, groups=GROUPS, epsilon=1e-5, key=rest, dtype=dtype)
        self.add_embedding = TimestepEmbedding(
            config.addition_time_embed_dim, config.time_dim, key=first, dtype=dtype, role="embedder", numbers=config.ids
        )

    def embed(self, latents, timestep, context, *, image_latents=None, added_time_ids=None):
        """Latents (batch, frames, height, width, out_channels) -> the stream and its conditioning.

        Computation is in the type of the weights.

        Args:
            latents, timestep, context: See `VideoModel`. Latents have variance 1, timesteps are the logarithm of the
                noise level divided by 4 (`qvdjax.diffusion.EulerEDM`), and the context is CLIP's embedding of the
                image, (batch, 1, text_dim).
            image_latents: The image's, (batch, frames or 1, height, width, in_channels - out_channels). They may also
                be the last channels of `latents`.
            added_time_ids: (batch, 3): frames a second less one, motion bucket, strength of the noise on the image.

        Raises:
            UserError: No frame, a height or width that cannot be halved as often as the model does, other channels or
                another width of the context than the checkpoint's, a condition that is missing or does not fit,
                timesteps a token.
        """
        if image_latents is not None:
            if image_latents.ndim == 5 and image_latents.shape[1] == 1:
                image_latents = jnp.repeat(image_latents, latents.shape[1], axis=1)  # b 1 h w c -> b f h w c
            latents = join_image(latents, image_latents)
        ids = None if added_time_ids is None else added_time_ids.shape
        check_inputs(self.config, latents.shape, jnp.shape(timestep), context.shape, ids)
        sample = self.first_sample(latents)
        embedding = self.time_embedding(timestep, self.dtype) + self.add_embedding(added_time_ids, self.dtype)
        conditioning = UNetConditioning(embedding.astype(self.dtype), context.astype(self.dtype))
        return UNetStream(sample, (sample,)), conditioning


def _parts(config: UNetSpatioTemporalConfig, place: Place, *, key: jax.Array, dtype) -> Parts:
    """What a block does. In the middle there is a ResNet on either side of the transformer."""
    keys, width = jax.random.split(key, 3), place.width
    # diffusers hands no epsilon on to blocks that attend and to those of the way up, which have a default of their own.
    epsilon = 1e-5 if place.way == "middle" or (place.way == "down" and not place.attends) else 1e-6
    resnet = functools.partial(
        SpatioTemporalResnet, place.channels, width, config.time_dim, groups=GROUPS, epsilon=epsilon, parts=place.parts,
        dtype=dtype,
    )  # fmt: skip
    number = place.number or "0"
    parts = [("resnets", number, resnet(key=keys[0]))]
    if place.attends:
        heads, context = config.num_attention_heads[place.level], config.cross_attention_dim
        transformer = SpatioTemporalTransformer(width, heads, context, GROUPS, key=keys[1], dtype=dtype)
        parts.append(("attentions", number, transformer))
    if place.way == "middle":
        parts.append(("resnets", "1", resnet(key=keys[2])))
    return parts
