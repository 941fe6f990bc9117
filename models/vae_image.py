"""Stable Diffusion's VAE (diffusers' AutoencoderKL), which AnimateDiff and ModelScope use: every frame on its own.

Read in diffusers 0.42 `models/autoencoders/autoencoder_kl.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from models.vae_config import VAEConfig, list_field
from models.vae_image_layers import Decoder, Encoder, frames_in_chunks
from models.vae_layers import conv, dtype_of
from models.vae_protocol import Posterior, VideoVAE, check_latents, check_video
from models.vae_tiling import Tiling, apply_to_latents, apply_to_video
from qvdjax.errors import UserError

# Frames that are encoded or decoded at a time: diffusers' pipelines decode 16, which needs twice the memory.
FRAMES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig(VAEConfig):
    """Fields of `config.json`; the defaults are diffusers', and the published models' are others.

    `sample_size` is the side of the images that it was trained on, and diffusers' tile; `force_upcast` says that the
    weights are meant for float32.
    """

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = list_field("DownEncoderBlock2D")
    up_block_types: tuple[str, ...] = list_field("UpDecoderBlock2D")
    block_out_channels: tuple[int, ...] = list_field(64)
    layers_per_block: int = 1
    act_fn: str = "silu"
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True

    def __post_init__(self):
        self.refuse_others({"act_fn": "silu", "latents_mean": None, "latents_std": None})
        self.check_levels(down_block_types="DownEncoderBlock2D", up_block_types="UpDecoderBlock2D")
        self.check_groups()
        shift = self.shift_factor
        if shift is not None and (isinstance(shift, bool) or not isinstance(shift, (int, float))):
            raise UserError(f"config.json: shift_factor is {shift!r}", remedy="it must be a number or null")

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that become one of latents."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return 1, side, side

    @property
    def default_tiling(self) -> Tiling:
        """diffusers' tiles: as large as the images of `sample_size`, a quarter of each over the next one."""
        tile = self.sample_size // self.compression[1]
        return Tiling((tile, tile), (int(tile * 0.75),) * 2)

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("AutoencoderKL")


class AutoencoderKL(VideoVAE):
    """Stable Diffusion's VAE over the frames of a video."""

    def __init__(self, config: ImageVAEConfig, *, key: jax.Array, dtype=jnp.float32):
        made = {"rngs": nnx.Rngs(params=key), "dtype": dtype}
        self.config = config
        widths, layers, latents = config.block_out_channels, config.layers_per_block, config.latent_channels
        alike = {"groups": config.norm_num_groups, "attention": config.mid_block_add_attention, **made}
        self.encoder = Encoder(config.in_channels, latents, widths, layers, **alike)
        self.decoder = Decoder(latents, config.out_channels, widths, layers, **alike)
        self.quant_conv = conv(2 * latents, 2 * latents, (1, 1), **made) if config.use_quant_conv else None
        self.post_quant_conv = conv(latents, latents, (1, 1), **made) if config.use_post_quant_conv else None

    def encode(self, video: jax.Array, *, tiling: Tiling | None = None) -> Posterior:
        """A video -> the Gaussian over its latents, `FRAMES_AT_ONCE` frames at a time.

        Args:
            video: (batch, frames, height, width, in_channels), -1 to 1.
            tiling: Encode in tiles; diffusers' are `config.default_tiling`.

        Raises:
            UserError: Another shape, or sides that are no multiples of the compression's.
        """
        check_video(video.shape, self.config.in_channels, self.config.compression)
        video = video.astype(dtype_of(self.encoder.conv_in))
        return Posterior.of_moments(apply_to_video(_moments, self, video, tiling))

    def decode(self, latents: jax.Array, *, tiling: Tiling | None = None) -> jax.Array:
        """The VAE's own latents -> a video, `FRAMES_AT_ONCE` frames at a time.

        Args:
            latents: (batch, frames, height, width, latent_channels).
            tiling: Decode in tiles.

        Returns:
            (batch, frames, height', width', out_channels); as in diffusers values may lie beyond -1 to 1.

        Raises:
            UserError: Another shape.
        """
        check_latents(latents.shape, self.config.latent_channels)
        return apply_to_latents(_pixels, self, latents.astype(dtype_of(self.decoder.conv_in)), tiling)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """(latents - shift_factor) * scaling_factor."""
        return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """latents / scaling_factor + shift_factor."""
        return latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)


def _moments(vae: AutoencoderKL, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, in_channels) -> (batch, frames, height', width', 2 x latent channels)."""

    def run(images):
        moments = vae.encoder(images)
        return moments if vae.quant_conv is None else vae.quant_conv(moments)

    return frames_in_chunks(run, video, FRAMES_AT_ONCE)


def _pixels(vae: AutoencoderKL, latents: jax.Array) -> jax.Array:
    """(batch, frames, height, width, latent channels) -> (batch, frames, height', width', out_channels)."""

    def run(images):
        return vae.decoder(images if vae.post_quant_conv is None else vae.post_quant_conv(images))

    return frames_in_chunks(run, latents, FRAMES_AT_ONCE)
