"""The VAE of Wan 2.1 (diffusers' AutoencoderKLWan): 4 x 8 x 8 pixels to one of 16 channels, causal in time.

Read in diffusers 0.42 `models/autoencoders/autoencoder_kl_wan.py`. There a video is encoded and decoded a latent frame
at a time; because no layer but the causal convolutions sees more than one frame, that equals a single pass.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.unet_stream import per_frame
from models.vae_config import VAEConfig, list_field
from models.vae_history import History, causal, in_chunks
from models.vae_layers import AFTER, ONE_AROUND, attend_within_frames, conv, doubled, dtype_of
from models.vae_protocol import Posterior, VideoVAE, check_latents, check_video
from models.vae_tiling import Tiling, apply_to_latents, apply_to_video
from qvdjax.errors import UserError
from qvdjax.nn import Param, at_least_float32

_WITHIN = {"kernel": (3, 3, 3), "padding": ((0, 0), *ONE_AROUND)}  # frames are put before x by hand
_ALONG = {"kernel": (3, 1, 1)}


@dataclasses.dataclass(frozen=True)
class WanVAEConfig(VAEConfig):
    """Fields of `config.json`; the defaults are diffusers', and Wan 2.1's."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = list_field(1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = list_field()
    temperal_downsample: tuple[bool, ...] = list_field(False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = list_field(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
        -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    latents_std: tuple[float, ...] = list_field(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
        2.8251, 1.9160,
    )  # fmt: skip
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int | None = 4
    scale_factor_spatial: int | None = 8

    def __post_init__(self):
        if self.is_residual or self.patch_size is not None:
            raise UserError(
                "config.json describes Wan 2.2's VAE (is_residual, patch_size), which is not supported yet",
                remedy="use the VAE of Wan 2.1, which the 14B models of Wan 2.2 have too",
            )
        self.check_list("attn_scales", float, 0)
        self.check_list("dim_mult", int)
        self.check_list("temperal_downsample", bool, len(self.dim_mult) - 1)
        self.check_list("latents_mean", float, self.z_dim)
        self.check_list("latents_std", float, self.z_dim)
        if min(self.latents_std) <= 0:
            raise UserError("config.json: latents_std is not positive", remedy="restore the file")
        odd = [width for width in self.decoder_widths[1:-1] if width % 2]
        if odd:
            raise UserError(f"{odd[0]} channels cannot be halved", remedy="choose an even decoder_base_dim")

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return self.z_dim

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that become one of latents; a video's first frame is one of its own."""
        side = 2 ** (len(self.dim_mult) - 1)
        return 2 ** sum(self.temperal_downsample), side, side

    @property
    def default_tiling(self) -> Tiling:
        """diffusers' tiles: 256 pixels wide and high, one every 192."""
        rows, columns = self.compression[1:]
        return Tiling((256 // rows, 256 // columns), (192 // rows, 192 // columns))

    @property
    def encoder_widths(self) -> tuple[int, ...]:
        """Channels behind the first convolution and at each level, from the finest on."""
        return self.base_dim, *(self.base_dim * times for times in self.dim_mult)

    @property
    def decoder_widths(self) -> tuple[int, ...]:
        """Channels behind the first convolution and at each level, from the coarsest on."""
        base = self.base_dim if self.decoder_base_dim is None else self.decoder_base_dim
        return base * self.dim_mult[-1], *(base * times for times in reversed(self.dim_mult))

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("AutoencoderKLWan")


class ChannelNorm(nnx.Module):
    """x / max(|x|, 1e-12) * sqrt(channels) * gamma, |x| over the channels of a position.

    Attributes:
        gamma: [channels, 1, 1] for layers of images and [channels, 1, 1, 1] for those of videos, as in diffusers.
    """

    def __init__(self, width: int, *, images: bool = False, dtype):
        shape = (width, *(1,) * (2 if images else 3))
        self.gamma = Param(jnp.ones(shape, dtype), axes=(None,) * len(shape), keep_float32=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (..., channels) -> the same shape and type."""
        wide = at_least_float32(x)
        length = jnp.maximum(jnp.sqrt((wide * wide).sum(axis=-1, keepdims=True)), 1e-12)
        gamma = self.gamma[...].reshape(-1)  # c 1 1 [1] -> c
        return (wide / length * x.shape[-1] ** 0.5 * gamma).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice; added to the input."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs, dtype):
        make = functools.partial(conv, rngs=rngs, dtype=dtype)
        self.norm1, self.norm2 = ChannelNorm(features, dtype=dtype), ChannelNorm(width, dtype=dtype)
        self.conv1, self.conv2 = make(features, width, **_WITHIN), make(width, width, **_WITHIN)
        self.conv_shortcut = None if features == width else make(features, width, (1, 1, 1))

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        inner = causal(self.conv1, jax.nn.silu(self.norm1(x)), history)
        inner = causal(self.conv2, jax.nn.silu(self.norm2(inner)), history)
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Attention of one head among the positions of each frame, added to the input."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype):
        self.norm = ChannelNorm(width, images=True, dtype=dtype)
        self.to_qkv = conv(width, 3 * width, (1, 1), rngs=rngs, dtype=dtype)
        self.proj = conv(width, width, (1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same; frames do not see each other."""
        return x + per_frame(self._attend, x)

    def _attend(self, x):
        query, key, value = jnp.split(self.to_qkv(self.norm(x)), 3, axis=-1)  # (b f) h w 3c -> 3 of (b f) h w c
        return self.proj(attend_within_frames(query, key, value))


class MidBlock(nnx.Module):
    """ResNet block, attention, ResNet block."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype):
        self.attentions = nnx.List([AttentionBlock(width, rngs=rngs, dtype=dtype)])
        self.resnets = nnx.List([ResnetBlock(width, width, rngs=rngs, dtype=dtype) for _ in range(2)])

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        x = self.attentions[0](self.resnets[0](x, history), history)
        return self.resnets[1](x, history)


class Downsample(nnx.Module):
    """Halves height and width, and then with `temporal` the frames after a video's first one."""

    def __init__(self, width: int, *, temporal: bool, rngs: nnx.Rngs, dtype):
        make = functools.partial(conv, width, width, rngs=rngs, dtype=dtype)
        self.resample = nnx.Dict({"1": make((3, 3), stride=(2, 2), padding=AFTER)})
        self.time_conv = make((3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels) -> (batch, frames', height / 2, width / 2, channels).

        frames' = (frames + 1) / 2 at the beginning of a video, else frames / 2.
        """
        x = per_frame(self.resample["1"], x)
        if self.time_conv is None:
            return x
        pairs = self.time_conv(history.prepend(x, 1, "nothing"))
        return jnp.concatenate([x[:, :1], pairs], axis=1) if history.begins else pairs


class Upsample(nnx.Module):
    """With `temporal` makes two of each frame after a video's first one; then doubles height and width.

    It halves the channels.
    """

    def __init__(self, width: int, *, temporal: bool, rngs: nnx.Rngs, dtype):
        make = functools.partial(conv, width, rngs=rngs, dtype=dtype)
        self.resample = nnx.Dict({"1": make(width // 2, (3, 3), padding=ONE_AROUND)})
        self.time_conv = make(2 * width, **_ALONG) if temporal else None

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels) -> (batch, frames', 2 height, 2 width, channels / 2).

        frames' = 2 frames - 1 at the beginning of a video, else 2 frames.
        """
        if self.time_conv is not None:
            alone = 1 if history.begins else 0  # the first frame stays as it is, and the others do not see it
            pairs = causal(self.time_conv, x[:, alone:], history)
            pairs = rearrange(pairs, "b f h w (two c) -> b (f two) h w c", two=2)
            x = jnp.concatenate([x[:, :alone], pairs], axis=1)
        return per_frame(lambda frames: self.resample["1"](doubled(frames)), x)


class UpBlock(nnx.Module):
    """The ResNet blocks of a level of the decoder, and what leads to the next one."""

    def __init__(self, features: int, width: int, layers: int, upsample: Upsample | None, *, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        self.resnets = nnx.List([ResnetBlock(entry, width, rngs=rngs, dtype=dtype) for entry in entries])
        self.upsamplers = None if upsample is None else nnx.List([upsample])

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels')."""
        for resnet in self.resnets:
            x = resnet(x, history)
        return x if self.upsamplers is None else self.upsamplers[0](x, history)


class Encoder(nnx.Module):
    """A video -> moments of its latents. Blocks and samplers of all levels are numbered through."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs, dtype):
        made = {"rngs": rngs, "dtype": dtype}
        first, *widths = config.encoder_widths
        self.conv_in = conv(config.in_channels, first, **_WITHIN, **made)
        blocks, features = [], first
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                blocks.append(ResnetBlock(features, width, **made))
                features = width
            if level < len(widths) - 1:
                blocks.append(Downsample(width, temporal=config.temperal_downsample[level], **made))
        self.down_blocks = nnx.List(blocks)
        self.mid_block = MidBlock(features, **made)
        self.norm_out = ChannelNorm(features, dtype=dtype)
        self.conv_out = conv(features, 2 * config.z_dim, **_WITHIN, **made)

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
        x = causal(self.conv_in, x, history)
        for block in self.down_blocks:
            x = block(x, history)
        x = self.mid_block(x, history)
        return causal(self.conv_out, jax.nn.silu(self.norm_out(x)), history)


class Decoder(nnx.Module):
    """Latents -> a video."""

    def __init__(self, config: WanVAEConfig, *, rngs: nnx.Rngs, dtype):
        made = {"rngs": rngs, "dtype": dtype}
        first, *widths = config.decoder_widths
        self.conv_in = conv(config.z_dim, first, **_WITHIN, **made)
        self.mid_block = MidBlock(first, **made)
        blocks, features = [], first
        doubles_frames = (*reversed(config.temperal_downsample), None)  # None behind the last level
        for width, temporal in zip(widths, doubles_frames, strict=True):
            upsample = None if temporal is None else Upsample(width, temporal=temporal, **made)
            blocks.append(UpBlock(features, width, config.num_res_blocks + 1, upsample, **made))
            features = width // 2  # what the upsampler leaves
        self.up_blocks = nnx.List(blocks)
        self.norm_out = ChannelNorm(widths[-1], dtype=dtype)
        self.conv_out = conv(widths[-1], config.out_channels, **_WITHIN, **made)

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
        x = self.mid_block(causal(self.conv_in, x, history), history)
        for block in self.up_blocks:
            x = block(x, history)
        return causal(self.conv_out, jax.nn.silu(self.norm_out(x)), history)


class AutoencoderKLWan(VideoVAE):
    """Wan 2.1's VAE. 4n + 1 frames become n + 1 latent frames. Its published weights are meant for float32."""

    def __init__(self, config: WanVAEConfig, *, key: jax.Array, dtype=jnp.float32):
        made = {"rngs": nnx.Rngs(params=key), "dtype": dtype}
        self.config = config
        self.encoder, self.decoder = Encoder(config, **made), Decoder(config, **made)
        self.quant_conv = conv(2 * config.z_dim, 2 * config.z_dim, (1, 1, 1), **made)
        self.post_quant_conv = conv(config.z_dim, config.z_dim, (1, 1, 1), **made)

    def encode(self, video: jax.Array, *, scan: bool = True, tiling: Tiling | None = None) -> Posterior:
        """A video -> the Gaussian over its latents.

        Args:
            video: (batch, n * compression + 1 frames, height, width, in_channels), -1 to 1.
            scan: Encode a latent frame at a time, in the memory that one takes; False encodes all in one pass. Both
                give the same, up to rounding.
            tiling: Encode in tiles; diffusers' are `config.default_tiling`.

        Raises:
            UserError: Another shape, another number of frames, or sides that are no multiples of the compression's.
        """
        config = self.config
        time = config.compression[0]
        wrong = (video.shape[1:2] or (0,))[0] % time != 1 % time
        remedy = f"choose {time}n + 1, such as {time * 20 + 1}, or cut the video" if wrong else None
        check_video(video.shape, config.in_channels, config.compression, frames=remedy)
        video = video.astype(dtype_of(self.quant_conv))
        return Posterior.of_moments(apply_to_video(_scan_moments if scan else _moments, self, video, tiling))

    def decode(self, latents: jax.Array, *, scan: bool = True, tiling: Tiling | None = None) -> jax.Array:
        """The VAE's own latents -> a video.

        Args:
            latents: (batch, n + 1 frames, height, width, z_dim).
            scan: Decode a latent frame at a time, in the memory that one takes; False decodes all in one pass. Both
                give the same, up to rounding.
            tiling: Decode in tiles.

        Returns:
            (batch, n * compression + 1 frames, height', width', out_channels), clipped to -1 to 1.

        Raises:
            UserError: Another shape.
        """
        check_latents(latents.shape, self.config.z_dim)
        latents = latents.astype(dtype_of(self.post_quant_conv))
        video = apply_to_latents(_scan_pixels if scan else _pixels, self, latents, tiling)
        return jnp.clip(video, -1.0, 1.0)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """(latents - latents_mean) / latents_std, one number a channel; diffusers' pipelines do it, not its VAE."""
        mean, std = self._statistics(latents.dtype)
        return (latents - mean) / std

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """latents * latents_std + latents_mean."""
        mean, std = self._statistics(latents.dtype)
        return latents * std + mean

    def _statistics(self, dtype) -> tuple[jax.Array, jax.Array]:
        return jnp.asarray(self.config.latents_mean, dtype), jnp.asarray(self.config.latents_std, dtype)


def _moments(vae: AutoencoderKLWan, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
    return vae.quant_conv(vae.encoder(video, History()))


def _scan_moments(vae: AutoencoderKLWan, video: jax.Array) -> jax.Array:
    """As `_moments`, a latent frame at a time."""
    return vae.quant_conv(in_chunks(vae.encoder, video, 1, vae.config.compression[0]))


def _pixels(vae: AutoencoderKLWan, latents: jax.Array) -> jax.Array:
    """(batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
    return vae.decoder(vae.post_quant_conv(latents), History())


def _scan_pixels(vae: AutoencoderKLWan, latents: jax.Array) -> jax.Array:
    """As `_pixels`, a latent frame at a time."""
    return in_chunks(vae.decoder, vae.post_quant_conv(latents), 1, 1)
