"""CogVideoX's VAE (diffusers' AutoencoderKLCogVideoX): 4 x 8 x 8 pixels to one of 16 channels, causal in time.

Read in diffusers 0.42 `models/autoencoders/autoencoder_kl_cogvideox.py`, `models/downsampling.py`
(CogVideoXDownsample3D) and `models/upsampling.py` (CogVideoXUpsample3D). There two latent frames are decoded, and eight
frames encoded, at a time. Group norms take their statistics over such a chunk, so its length is part of the model:
another one gives other videos.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from models.unet_stream import per_frame
from models.vae_config import VAEConfig, list_field
from models.vae_history import History, causal, in_chunks
from models.vae_layers import AFTER, ONE_AROUND, conv, doubled, dtype_of
from models.vae_protocol import Posterior, VideoVAE, check_latents, check_video
from models.vae_tiling import Tiling, apply_to_latents, apply_to_video
from qvdjax.errors import UserError
from qvdjax.nn import GroupNorm

FRAMES_AT_ONCE, LATENTS_AT_ONCE = 8, 2
_EPSILON = 1e-6  # of the norms that `norm_eps` is not for: the decoder's, and each way's last


@dataclasses.dataclass(frozen=True)
class CogVideoXVAEConfig(VAEConfig):
    """Fields of `config.json`; the defaults are diffusers', and CogVideoX-2B's."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = list_field(*["CogVideoXDownBlock3D"] * 4)
    up_block_types: tuple[str, ...] = list_field(*["CogVideoXUpBlock3D"] * 4)
    block_out_channels: tuple[int, ...] = list_field(128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    def __post_init__(self):
        self.refuse_others({
            "act_fn": "silu", "shift_factor": None, "latents_mean": None, "latents_std": None, "use_quant_conv": False,
            "use_post_quant_conv": False,
        })  # fmt: skip
        self.check_levels(down_block_types="CogVideoXDownBlock3D", up_block_types="CogVideoXUpBlock3D")
        self.check_groups()
        ratios = [2**halvings for halvings in range(min(len(self.block_out_channels), 4))]
        if self.temporal_compression_ratio not in ratios:  # a chunk of eight frames is halved three times at most
            raise UserError(
                f"config.json: temporal_compression_ratio is {self.temporal_compression_ratio}",
                remedy=f"choose from {', '.join(map(str, ratios))}",
            )

    @property
    def halvings(self) -> int:
        """At how many levels, from the finest on, frames are halved; from the coarsest on, doubled."""
        return self.temporal_compression_ratio.bit_length() - 1

    @property
    def compression(self) -> tuple[int, int, int]:
        """Frames, rows and columns of pixels that become one of latents; an odd first frame is one of its own."""
        side = 2 ** (len(self.block_out_channels) - 1)
        return self.temporal_compression_ratio, side, side

    @property
    def default_tiling(self) -> Tiling:
        """diffusers' tiles: half as high and wide as the videos it is for, a sixth and a fifth over the next ones."""
        height, width = (
            size // 2 // side
            for size, side in zip((self.sample_height, self.sample_width), self.compression[1:], strict=True)
        )
        return Tiling((height, width), (int(height * (1 - 1 / 6)), int(width * (1 - 1 / 5))))

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("AutoencoderKLCogVideoX")


class CausalConv(nnx.Module):
    """A convolution that sees no later frame; before a video's first frame stand copies of it."""

    def __init__(self, features: int, width: int, size: int = 3, *, rngs: nnx.Rngs, dtype):
        padding = ((0, 0), *ONE_AROUND) if size == 3 else None
        self.conv = conv(features, width, (size,) * 3, padding=padding, rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        return causal(self.conv, x, history, start="first") if self.conv.kernel[0] > 1 else self.conv(x)


class SpatialNorm(nnx.Module):
    """Group norm of a chunk, scaled and shifted by two convolutions of the latents it comes from (arXiv 2209.09002)."""

    def __init__(self, width: int, latents: int, *, groups: int, rngs: nnx.Rngs, dtype):
        self.norm_layer = GroupNorm(width, groups, epsilon=_EPSILON, dtype=dtype)
        self.conv_y, self.conv_b = (CausalConv(latents, width, 1, rngs=rngs, dtype=dtype) for _ in range(2))

    def __call__(self, x: jax.Array, latents: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels), latents (batch, frames', height', width', theirs) -> like x."""
        # A convolution of single positions is the same before and after its input is repeated, and cheaper before.
        scale, shift = (_repeated(layer(latents, history), x.shape) for layer in (self.conv_y, self.conv_b))
        return (self.norm_layer(x) * scale + shift).astype(x.dtype)


def _repeated(latents: jax.Array, like: tuple[int, ...]) -> jax.Array:
    """latents (batch, frames, height, width, channels) as large as a shape `like`, whose sides are multiples.

    Of an odd number of frames the first is one of its own, and the others are repeated.
    """
    alone = latents.shape[1] % 2
    times = (like[1] - alone) // max(latents.shape[1] - alone, 1)
    rest = repeat(latents[:, alone:], "b f h w c -> b (f t) h w c", t=times)
    rows, columns = like[2] // latents.shape[2], like[3] // latents.shape[3]
    frames = jnp.concatenate([latents[:, :alone], rest], axis=1)
    return repeat(frames, "b f h w c -> b f (h r) (w s) c", r=rows, s=columns)


class PlainNorm(GroupNorm):
    """Group norm of a chunk, where there are no latents yet: in the encoder."""

    def __call__(self, x: jax.Array, latents: None, history: History) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        return super().__call__(x).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Norm, SiLU and causal convolution, twice; added to the input. `norm` makes one for so many channels."""

    def __init__(self, features: int, width: int, norm, *, rngs: nnx.Rngs, dtype):
        self.norm1, self.norm2 = norm(features), norm(width)
        self.conv1 = CausalConv(features, width, rngs=rngs, dtype=dtype)
        self.conv2 = CausalConv(width, width, rngs=rngs, dtype=dtype)
        self.conv_shortcut = None if features == width else conv(features, width, (1, 1, 1), rngs=rngs, dtype=dtype)

    def __call__(self, x: jax.Array, latents: jax.Array | None, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        inner = self.conv1(jax.nn.silu(self.norm1(x, latents, history)), history)
        inner = self.conv2(jax.nn.silu(self.norm2(inner, latents, history)), history)
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Resnets(nnx.Module):
    """ResNet blocks one after the other: the middle of an encoder or a decoder."""

    def __init__(self, features: int, width: int, layers: int, norm, *, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        self.resnets = nnx.List([ResnetBlock(entry, width, norm, rngs=rngs, dtype=dtype) for entry in entries])

    def __call__(self, x: jax.Array, latents: jax.Array | None, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> like x with `width` channels."""
        for resnet in self.resnets:
            x = resnet(x, latents, history)
        return x


class DownBlock(Resnets):
    """A level of the encoder; unless it is the last one it halves height, width, and with `temporal` frames."""

    def __init__(self, features, width, layers, norm, *, last: bool, temporal: bool, rngs: nnx.Rngs, dtype):
        super().__init__(features, width, layers, norm, rngs=rngs, dtype=dtype)
        halve = None if last else conv(width, width, (3, 3), stride=(2, 2), padding=AFTER, rngs=rngs, dtype=dtype)
        self.downsamplers = None if halve is None else nnx.List([nnx.Dict({"conv": halve})])
        self.temporal = temporal

    def __call__(self, x: jax.Array, latents: None, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels)."""
        x = super().__call__(x, latents, history)
        if self.downsamplers is None:
            return x
        if self.temporal:
            alone = x.shape[1] % 2  # an odd frame, the first, stays
            pairs = rearrange(x[:, alone:], "b (f two) h w c -> two b f h w c", two=2).mean(axis=0)
            x = jnp.concatenate([x[:, :alone], pairs], axis=1)
        return per_frame(self.downsamplers[0]["conv"], x)


class UpBlock(Resnets):
    """A level of the decoder; unless it is the last one it doubles height, width, and with `temporal` frames."""

    def __init__(self, features, width, layers, norm, *, last: bool, temporal: bool, rngs: nnx.Rngs, dtype):
        super().__init__(features, width, layers, norm, rngs=rngs, dtype=dtype)
        after = None if last else conv(width, width, (3, 3), padding=ONE_AROUND, rngs=rngs, dtype=dtype)
        self.upsamplers = None if after is None else nnx.List([nnx.Dict({"conv": after})])
        self.temporal = temporal

    def __call__(self, x: jax.Array, latents: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, features) -> (batch, frames', height', width', channels)."""
        x = super().__call__(x, latents, history)
        if self.upsamplers is None:
            return x
        if self.temporal:
            alone = x.shape[1] % 2
            pairs = repeat(x[:, alone:], "b f h w c -> b (f two) h w c", two=2)
            x = jnp.concatenate([x[:, :alone], pairs], axis=1)
        return per_frame(lambda frames: self.upsamplers[0]["conv"](doubled(frames)), x)


class Encoder(nnx.Module):
    """A chunk of a video -> moments of its latents."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs, dtype):
        made, widths, layers = {"rngs": rngs, "dtype": dtype}, config.block_out_channels, config.layers_per_block
        norm = functools.partial(PlainNorm, groups=config.norm_num_groups, dtype=dtype)
        inner = functools.partial(norm, epsilon=config.norm_eps)
        self.conv_in = CausalConv(config.in_channels, widths[0], **made)
        entries, last = (widths[0], *widths[:-1]), len(widths) - 1
        self.down_blocks = nnx.List([
            DownBlock(entry, width, layers, inner, last=level == last, temporal=level < config.halvings, **made)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ])  # fmt: skip
        self.mid_block = Resnets(widths[-1], widths[-1], 2, inner, **made)
        self.norm_out = norm(widths[-1], epsilon=_EPSILON)
        self.conv_out = CausalConv(widths[-1], 2 * config.latent_channels, **made)

    def __call__(self, x: jax.Array, history: History) -> jax.Array:
        """x (batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
        x = self.conv_in(x, history)
        for block in self.down_blocks:
            x = block(x, None, history)
        x = self.mid_block(x, None, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x, None, history)), history)


class Decoder(nnx.Module):
    """A chunk of latents -> a chunk of a video."""

    def __init__(self, config: CogVideoXVAEConfig, *, rngs: nnx.Rngs, dtype):
        made, widths = {"rngs": rngs, "dtype": dtype}, config.block_out_channels[::-1]
        latents = config.latent_channels
        norm = functools.partial(SpatialNorm, latents=latents, groups=config.norm_num_groups, **made)
        self.conv_in = CausalConv(latents, widths[0], **made)
        self.mid_block = Resnets(widths[0], widths[0], 2, norm, **made)
        entries, last, layers = (widths[0], *widths[:-1]), len(widths) - 1, config.layers_per_block + 1
        self.up_blocks = nnx.List([
            UpBlock(entry, width, layers, norm, last=level == last, temporal=level < config.halvings, **made)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ])  # fmt: skip
        self.norm_out = norm(widths[-1])
        self.conv_out = CausalConv(widths[-1], config.out_channels, **made)

    def __call__(self, latents: jax.Array, history: History) -> jax.Array:
        """(batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
        x = self.mid_block(self.conv_in(latents, history), latents, history)
        for block in self.up_blocks:
            x = block(x, latents, history)
        return self.conv_out(jax.nn.silu(self.norm_out(x, latents, history)), history)


class AutoencoderKLCogVideoX(VideoVAE):
    """CogVideoX's VAE. 4n + 1 frames become n + 1 latent frames, 4n become n."""

    def __init__(self, config: CogVideoXVAEConfig, *, key: jax.Array, dtype=jnp.float32):
        made = {"rngs": nnx.Rngs(params=key), "dtype": dtype}
        self.config = config
        self.encoder, self.decoder = Encoder(config, **made), Decoder(config, **made)

    def encode(self, video: jax.Array, *, tiling: Tiling | None = None) -> Posterior:
        """A video -> the Gaussian over its latents, eight frames at a time.

        Args:
            video: (batch, frames, height, width, in_channels), -1 to 1; frames are n * compression + 1,
                or n * compression.
            tiling: Encode in tiles; diffusers' are `config.default_tiling`.

        Raises:
            UserError: Another shape, another number of frames, or sides that are no multiples of the compression's.
        """
        time = self.config.compression[0]
        wrong = len(video.shape) == 5 and video.shape[1] % time > 1
        remedy = f"choose {time}n + 1, such as {time * 12 + 1}, or cut the video" if wrong else None
        check_video(video.shape, self.config.in_channels, self.config.compression, frames=remedy)
        video = video.astype(dtype_of(self.encoder.conv_in.conv))
        return Posterior.of_moments(apply_to_video(_moments, self, video, tiling))

    def decode(self, latents: jax.Array, *, tiling: Tiling | None = None) -> jax.Array:
        """The VAE's own latents -> a video, two latent frames at a time.

        Args:
            latents: (batch, frames, height, width, latent_channels).
            tiling: Decode in tiles.

        Returns:
            (batch, frames', height', width', out_channels), where an odd number of latent frames, n + 1, is
            n * compression + 1 frames, and an even one n is n * compression. As in diffusers values may lie beyond -1
            to 1.

        Raises:
            UserError: Another shape.
        """
        check_latents(latents.shape, self.config.latent_channels)
        latents = latents.astype(dtype_of(self.decoder.conv_in.conv))
        return apply_to_latents(_pixels, self, latents, tiling)

    def normalize(self, latents: jax.Array) -> jax.Array:
        """latents * scaling_factor."""
        return latents * self.config.scaling_factor

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """latents / scaling_factor."""
        return latents / self.config.scaling_factor

    def normalize_image(self, latents: jax.Array) -> jax.Array:
        """Latents of the image that an image-to-video model is given: as `normalize`, but divided with
        `invert_scale_latents`, as CogVideoX 1.5's was trained."""
        return self.denormalize(latents) if self.config.invert_scale_latents else self.normalize(latents)


def _moments(vae: AutoencoderKLCogVideoX, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, in_channels) -> (batch, frames', height', width', 2 x latent channels)."""
    return in_chunks(vae.encoder, video, _first(video.shape[1], FRAMES_AT_ONCE), FRAMES_AT_ONCE)


def _pixels(vae: AutoencoderKLCogVideoX, latents: jax.Array) -> jax.Array:
    """(batch, frames, height, width, latent channels) -> (batch, frames', height', width', out_channels)."""
    return in_chunks(vae.decoder, latents, _first(latents.shape[1], LATENTS_AT_ONCE), LATENTS_AT_ONCE)


def _first(frames: int, length: int) -> int:
    """Frames of the first chunk: a whole one and what is left over of them all."""
    return frames if frames < length else length + frames % length
