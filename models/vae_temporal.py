"""Stable Video Diffusion's VAE (diffusers' AutoencoderKLTemporalDecoder): encoded a frame at a time, decoded together.

Read in diffusers 0.42 `models/autoencoders/autoencoder_kl_temporal_decoder.py`, `models/unets/unet_3d_blocks.py`
(MidBlockTemporalDecoder, UpBlockTemporalDecoder) and `models/resnet.py` (SpatioTemporalResBlock).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models.unet_spatio_temporal_blocks import Blend
from models.unet_stream import per_frame
from models.vae_config import VAEConfig, list_field
from models.vae_image import FRAMES_AT_ONCE
from models.vae_image_layers import (
    EPSILON,
    AttentionBlock,
    Encoder,
    ResnetBlock,
    finished,
    frames_in_chunks,
    upsample,
    upsampler,
)
from models.vae_layers import ONE_AROUND, conv, dtype_of
from models.vae_protocol import Posterior, VideoVAE, check_latents, check_video
from qvdjax.errors import UserError
from qvdjax.nn import GroupNorm

GROUPS = 32  # of all group norms; no field says it
_ALONG = {"kernel": (3, 1, 1), "padding": ((1, 1), (0, 0), (0, 0))}  # a frame and its two neighbours


@dataclasses.dataclass(frozen=True)
class TemporalVAEConfig(VAEConfig):
    """Fields of `config.json`; the defaults are diffusers', and the published model's are others."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = list_field("DownEncoderBlock2D")
    block_out_channels: tuple[int, ...] = list_field(64)
    layers_per_block: int = 1
    latent_channels: int = 4
    sample_size: int = 32
    scaling_factor: float = 0.18215
    force_upcast: bool = True

    def __post_init__(self):
        self.check_levels(down_block_types="DownEncoderBlock2D")
        # With one layer diffusers has an attention that it never applies, with more, layers that it never does.
        self.refuse_others({"layers_per_block": 2})
        for width in self.block_out_channels:
            if width % GROUPS:
                raise UserError(
                    f"config.json: {GROUPS} groups do not divide {width} channels",
                    remedy=f"choose multiples of {GROUPS}",
                )

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that become one of latents."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return 1, side, side

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("AutoencoderKLTemporalDecoder")


class AlongFrames(nnx.Module):
    """Norm over all frames, SiLU and a convolution of a position's neighbouring frames, twice; added to the input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype):
        self.norm1, self.norm2 = (GroupNorm(width, GROUPS, epsilon=1e-5, dtype=dtype) for _ in range(2))
        self.conv1, self.conv2 = (conv(width, width, **_ALONG, rngs=rngs, dtype=dtype) for _ in range(2))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        return x + finished(self.norm2, self.conv2, finished(self.norm1, self.conv1, x))


class SpatioTemporalResnet(nnx.Module):
    """A ResNet in every frame, one along frames on top of it, and both blended.

    `mix_factor` is the share of what is mixed over frames; in the UNet of the same name it is the other's.
    """

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, dtype):
        self.spatial_res_block = ResnetBlock(features, width, groups=GROUPS, rngs=rngs, dtype=dtype)
        self.temporal_res_block = AlongFrames(width, rngs=rngs, dtype=dtype)
        self.time_mixer = Blend(dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        spatial = per_frame(self.spatial_res_block, x)
        return self.time_mixer(self.temporal_res_block(spatial), spatial)


class MidBlock(nnx.Module):
    """ResNet block, attention in every frame, ResNet block."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype):
        self.attentions = nnx.List([AttentionBlock(width, groups=GROUPS, rngs=rngs, dtype=dtype)])
        self.resnets = nnx.List([SpatioTemporalResnet(width, width, rngs=rngs, dtype=dtype) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        return self.resnets[1](per_frame(self.attentions[0], self.resnets[0](x)))


class UpBlock(nnx.Module):
    """ResNet blocks, and a convolution behind doubled height and width."""

    def __init__(self, features: int, width: int, layers: int, *, last: bool, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        self.resnets = nnx.List([SpatioTemporalResnet(entry, width, rngs=rngs, dtype=dtype) for entry in entries])
        self.upsamplers = None if last else upsampler(width, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames, height', width', channels)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else per_frame(lambda images: upsample(self.upsamplers, images), x)


class TemporalDecoder(nnx.Module):
    """Latents -> frames that know of each other."""

    def __init__(self, config: TemporalVAEConfig, *, rngs: nnx.Rngs, dtype):
        made, widths = {"rngs": rngs, "dtype": dtype}, config.block_out_channels[::-1]
        square = {"kernel": (3, 3), "padding": ONE_AROUND, **made}
        self.conv_in = conv(config.latent_channels, widths[0], **square)
        self.mid_block = MidBlock(widths[0], **made)
        entries, last, layers = (widths[0], *widths[:-1]), len(widths) - 1, config.layers_per_block + 1
        self.up_blocks = nnx.List([
            UpBlock(entry, width, layers, last=level == last, **made)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ])  # fmt: skip
        self.conv_norm_out = GroupNorm(widths[-1], GROUPS, epsilon=EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], config.out_channels, **square)
        self.time_conv_out = conv(config.out_channels, config.out_channels, **_ALONG, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, latent channels) -> (batch, frames, height', width', out_channels)."""
        x = self.mid_block(per_frame(self.conv_in, x))
        for block in self.up_blocks:
            x = block(x)
        x = per_frame(lambda images: finished(self.conv_norm_out, self.conv_out, images), x)
        return self.time_conv_out(x)


class AutoencoderKLTemporalDecoder(VideoVAE):
    """Stable Video Diffusion's VAE."""

    def __init__(self, config: TemporalVAEConfig, *, key: jax.Array, dtype=jnp.float32):
        made, latents = {"rngs": nnx.Rngs(params=key), "dtype": dtype}, config.latent_channels
        self.config = config
        self.encoder = Encoder(
            config.in_channels, latents, config.block_out_channels, config.layers_per_block, groups=GROUPS, **made
        )
        self.decoder = TemporalDecoder(config, **made)
        self.quant_conv = conv(2 * latents, 2 * latents, (1, 1), **made)

    def encode(self, video: jax.Array) -> Posterior:
        """A video -> the Gaussian over its latents, a few frames at a time.

        Args:
            video: (batch, frames, height, width, in_channels), -1 to 1.

        Raises:
            UserError: Another shape, or sides that are no multiples of the compression's.
        """
        check_video(video.shape, self.config.in_channels, self.config.compression)
        video = video.astype(dtype_of(self.quant_conv))
        return Posterior.of_moments(_moments(self, video))

    def decode(self, latents: jax.Array, *, frames_at_once: int | None = None) -> jax.Array:
        """The VAE's own latents -> a video.

        Args:
            latents: (batch, frames, height, width, latent_channels).
            frames_at_once: How many frames are decoded together; frames of other chunks do not see each other, so that
                it changes the result. diffusers' pipeline takes as many as the model has frames: 14, or 25. None: all.

        Returns:
            (batch, frames, height', width', out_channels); as in diffusers values may lie beyond -1 to 1.

        Raises:
            UserError: Another shape, or a chunk without frames.
        """
        check_latents(latents.shape, self.config.latent_channels)
        length = latents.shape[1] if frames_at_once is None else frames_at_once
        if length < 1:
            raise UserError(f"{length} frames at once", remedy="give at least 1")
        latents = latents.astype(dtype_of(self.quant_conv))
        starts = range(0, latents.shape[1], length)
        return jnp.concatenate([_pixels(self, latents[:, start : start + length]) for start in starts], axis=1)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """latents * scaling_factor. The image's latents that the UNet is given as a condition are not scaled."""
        return latents * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """latents / scaling_factor."""
        return latents / self.config.scaling_factor


@jax.jit
def _moments(vae: AutoencoderKLTemporalDecoder, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, in_channels) -> (batch, frames, height', width', 2 x latent channels)."""
    return frames_in_chunks(lambda images: vae.quant_conv(vae.encoder(images)), video, FRAMES_AT_ONCE)


@jax.jit
def _pixels(vae: AutoencoderKLTemporalDecoder, latents: jax.Array) -> jax.Array:
    """(batch, frames, height, width, latent channels) -> (batch, frames, height', width', out_channels)."""
    return vae.decoder(latents)
