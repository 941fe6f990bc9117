"""HunyuanVideo's VAE (diffusers' AutoencoderKLHunyuanVideo): 4 x 8 x 8 pixels to one of 16 channels, causal in time.

Read in diffusers 0.42 `models/autoencoders/autoencoder_kl_hunyuan_video.py`. Long videos are encoded and decoded in
sections of 17 frames that overlap and are blended, as diffusers does it by default: attention and group norms in a
section see all of its frames, so the result is another one than in one pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from models.vae_config import VAEConfig, list_field
from models.vae_image_layers import EPSILON, AttentionBlock, finished
from models.vae_layers import conv, doubled, dtype_of
from models.vae_protocol import Posterior, VideoVAE, check_latents, check_video
from models.vae_tiling import Sections, Tiling, apply_to_latents, apply_to_video, in_sections
from qvdjax.errors import UserError
from qvdjax.nn import GroupNorm, dot_product_attention

_TIME = 4  # frames of pixels that become one of latents: the decoder knows no other number
SECTIONS = Sections(4, 3)  # of latent frames


@dataclasses.dataclass(frozen=True)
class HunyuanVideoVAEConfig(VAEConfig):
    """Fields of `config.json`; the defaults are diffusers', and the published model's."""

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    down_block_types: tuple[str, ...] = list_field(*["HunyuanVideoDownBlock3D"] * 4)
    up_block_types: tuple[str, ...] = list_field(*["HunyuanVideoUpBlock3D"] * 4)
    block_out_channels: tuple[int, ...] = list_field(128, 256, 512, 512)
    layers_per_block: int = 2
    act_fn: str = "silu"
    norm_num_groups: int = 32
    scaling_factor: float = 0.476986
    spatial_compression_ratio: int = 8
    temporal_compression_ratio: int = 4
    mid_block_add_attention: bool = True

    def __post_init__(self):
        self.refuse_others({"act_fn": "silu", "temporal_compression_ratio": _TIME})
        self.check_levels(down_block_types="HunyuanVideoDownBlock3D", up_block_types="HunyuanVideoUpBlock3D")
        self.check_groups()
        levels = len(self.block_out_channels)
        if levels < 3 or self.spatial_compression_ratio != 2 ** (levels - 1):
            raise UserError(
                f"config.json: {levels} levels of block_out_channels do not make a spatial_compression_ratio of "
                f"{self.spatial_compression_ratio}",
                remedy="every level but the last halves the sides; there are at least three",
            )

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that become one of latents; a video's first frame is one of its own."""
        return _TIME, self.spatial_compression_ratio, self.spatial_compression_ratio

    @property
    def factors(self) -> tuple[tuple[int, int, int] | None, ...]:
        """By how much each level of the encoder, from the finest on, divides frames, height and width, and each level
        of the decoder, from the coarsest on, multiplies them. None for the last."""
        levels = len(self.block_out_channels)
        return *((2 if level >= levels - 3 else 1, 2, 2) for level in range(levels - 1)), None

    @property
    def default_tiling(self) -> Tiling:
        """diffusers' tiles: 256 pixels wide and high, one every 192."""
        side = self.spatial_compression_ratio
        return Tiling((256 // side,) * 2, (192 // side,) * 2)

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("AutoencoderKLHunyuanVideo")


class CausalConv(nnx.Module):
    """A convolution that sees no later frame; a video goes on over its borders and before its first frame as it is
    there."""

    def __init__(self, features: int, width: int, size: int = 3, *, stride=None, rngs: nnx.Rngs, dtype):
        self.conv = conv(features, width, (size,) * 3, stride=stride, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels)."""
        before = self.conv.kernel[0] - 1
        sides = (before // 2, before // 2)
        return self.conv(jnp.pad(x, ((0, 0), (before, 0), sides, sides, (0, 0)), mode="edge"))


class ResnetBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice; added to the input."""

    def __init__(self, features: int, width: int, *, groups: int, rngs: nnx.Rngs, dtype):
        made = {"rngs": rngs, "dtype": dtype}
        self.norm1, self.norm2 = (GroupNorm(c, groups, epsilon=EPSILON, dtype=dtype) for c in (features, width))
        self.conv1, self.conv2 = CausalConv(features, width, **made), CausalConv(width, width, **made)
        self.conv_shortcut = None if features == width else CausalConv(features, width, 1, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        inner = finished(self.norm1, self.conv1, x)
        inner = finished(self.norm2, self.conv2, inner)
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class CausalAttentionBlock(AttentionBlock):
    """Norm over a section and attention of one head among all positions of a frame and those before it; added."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        inner = self.group_norm(x).astype(x.dtype)
        frames, positions = x.shape[1], x.shape[2] * x.shape[3]
        key, value = (rearrange(layer(inner), "b f h w c -> b (f h w) 1 c") for layer in (self.to_k, self.to_v))
        query = rearrange(self.to_q(inner), "b f h w c -> f b (h w) 1 c")

        def attend(frame):
            number, query = frame
            seen = jnp.full(x.shape[:1], (number + 1) * positions)
            return dot_product_attention(query, key, value, seen)

        out = jax.lax.map(attend, (jnp.arange(frames), query))
        out = rearrange(out, "f b (h w) 1 c -> b f h w c", h=x.shape[2])
        return x + self.to_out["0"](out)


class MidBlock(nnx.Module):
    """ResNet block, attention where there is one, ResNet block."""

    def __init__(self, width: int, *, groups: int, attention: bool, rngs: nnx.Rngs, dtype):
        made = {"groups": groups, "rngs": rngs, "dtype": dtype}
        self.attentions = nnx.List([CausalAttentionBlock(width, **made)] if attention else [])
        self.resnets = nnx.List([ResnetBlock(width, width, **made) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    """ResNet blocks, and unless it is the last level a convolution with these strides."""

    def __init__(self, features: int, width: int, layers: int, strides, *, groups: int, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        made = {"rngs": rngs, "dtype": dtype}
        self.resnets = nnx.List([ResnetBlock(entry, width, groups=groups, **made) for entry in entries])
        halve = None if strides is None else CausalConv(width, width, stride=strides, **made)
        self.downsamplers = None if halve is None else nnx.List([nnx.Dict({"conv": halve})])

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels)."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0]["conv"](x)


class UpBlock(nnx.Module):
    """ResNet blocks, and unless it is the last level a convolution behind repeated frames, rows and columns."""

    def __init__(self, features: int, width: int, layers: int, factors, *, groups: int, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        made = {"rngs": rngs, "dtype": dtype}
        self.resnets = nnx.List([ResnetBlock(entry, width, groups=groups, **made) for entry in entries])
        after = None if factors is None else CausalConv(width, width, **made)
        self.upsamplers = None if after is None else nnx.List([nnx.Dict({"conv": after})])
        self.times = 1 if factors is None else factors[0]

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels)."""
        for resnet in self.resnets:
            x = resnet(x)
        if self.upsamplers is None:
            return x
        rest = repeat(x[:, 1:], "b f h w c -> b (f t) h w c", t=self.times)  # the first frame stays one
        return self.upsamplers[0]["conv"](doubled(jnp.concatenate([x[:, :1], rest], axis=1)))


class Encoder(nnx.Module):
    """A section of a video -> moments of its latents."""

    def __init__(self, config: HunyuanVideoVAEConfig, *, rngs: nnx.Rngs, dtype):
        made, widths = {"rngs": rngs, "dtype": dtype}, config.block_out_channels
        block = functools.partial(DownBlock, layers=config.layers_per_block, groups=config.norm_num_groups, **made)
        self.conv_in = CausalConv(config.in_channels, widths[0], **made)
        levels = zip((widths[0], *widths[:-1]), widths, config.factors, strict=True)
        self.down_blocks = nnx.List([block(entry, width, strides=strides) for entry, width, strides in levels])
        self.mid_block = MidBlock(
            widths[-1], groups=config.norm_num_groups, attention=config.mid_block_add_attention, **made
        )
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return finished(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nnx.Module):
    """A section of latents -> a section of a video."""

    def __init__(self, config: HunyuanVideoVAEConfig, *, rngs: nnx.Rngs, dtype):
        made, widths = {"rngs": rngs, "dtype": dtype}, config.block_out_channels[::-1]
        block = functools.partial(UpBlock, layers=config.layers_per_block + 1, groups=config.norm_num_groups, **made)
        self.conv_in = CausalConv(config.latent_channels, widths[0], **made)
        self.mid_block = MidBlock(
            widths[0], groups=config.norm_num_groups, attention=config.mid_block_add_attention, **made
        )
        levels = zip((widths[0], *widths[:-1]), widths, config.factors, strict=True)
        self.up_blocks = nnx.List([block(entry, width, factors=factors) for entry, width, factors in levels])
        self.conv_norm_out = GroupNorm(widths[-1], config.norm_num_groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = CausalConv(widths[-1], config.out_channels, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return finished(self.conv_norm_out, self.conv_out, x)


class AutoencoderKLHunyuanVideo(VideoVAE):
    """HunyuanVideo's VAE. 4n + 1 frames become n + 1 latent frames."""

    def __init__(self, config: HunyuanVideoVAEConfig, *, key: jax.Array, dtype=jnp.float32):
        made, latents = {"rngs": nnx.Rngs(params=key), "dtype": dtype}, config.latent_channels
        self.config = config
        self.encoder, self.decoder = Encoder(config, **made), Decoder(config, **made)
        self.quant_conv = conv(2 * latents, 2 * latents, (1, 1, 1), **made)
        self.post_quant_conv = conv(latents, latents, (1, 1, 1), **made)

    def encode(
        self, video: jax.Array, *, sections: Sections | None = SECTIONS, tiling: Tiling | None = None
    ) -> Posterior:
        """A video -> the Gaussian over its latents.

        Args:
            video: (batch, 4n + 1 frames, height, width, in_channels), -1 to 1.
            sections: How it is cut in time where it is longer than a section; None: it is not.
            tiling: Encode each section in tiles; diffusers' are `config.default_tiling`.

        Raises:
            UserError: Another shape, another number of frames, or sides that are no multiples of the compression's.
        """
        wrong = len(video.shape) == 5 and video.shape[1] % _TIME != 1
        remedy = "choose 4n + 1, such as 129, or cut the video" if wrong else None
        check_video(video.shape, self.config.in_channels, self.config.compression, frames=remedy)
        video = video.astype(dtype_of(self.quant_conv))
        run = functools.partial(apply_to_video, _moments, self, tiling=tiling)
        return Posterior.of_moments(in_sections(run, video, sections and sections.longer(_TIME), sections))

    def decode(
        self, latents: jax.Array, *, sections: Sections | None = SECTIONS, tiling: Tiling | None = None
    ) -> jax.Array:
        """The VAE's own latents -> a video.

        Args:
            latents: (batch, n + 1 frames, height, width, latent_channels).
            sections: How they are cut in time where they are longer than a section; None: they are not.
            tiling: Decode each section in tiles.

        Returns:
            (batch, 4n + 1 frames, height', width', out_channels); as in diffusers values may lie beyond -1 to 1.

        Raises:
            UserError: Another shape.
        """
        check_latents(latents.shape, self.config.latent_channels)
        latents = latents.astype(dtype_of(self.quant_conv))
        run = functools.partial(apply_to_latents, _pixels, self, tiling=tiling)
        return in_sections(run, latents, sections, sections and sections.longer(_TIME))

    def normalize(self, latents: jax.Array) -> jax.Array:
        """latents * scaling_factor."""
        return latents * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """latents / scaling_factor."""
        return latents / self.config.scaling_factor


def _moments(vae: AutoencoderKLHunyuanVideo, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
    return vae.quant_conv(vae.encoder(video))


def _pixels(vae: AutoencoderKLHunyuanVideo, latents: jax.Array) -> jax.Array:
    """(batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
    return vae.decoder(vae.post_quant_conv(latents))
