"""Parts of Stable Diffusion's VAE, which sees one frame at a time; Stable Video Diffusion's shares them.

Images are (frames, height, width, channels). Read in diffusers 0.42 `models/autoencoders/vae.py` (Encoder, Decoder),
`models/resnet.py` (ResnetBlock2D), `models/unets/unet_2d_blocks.py` (UNetMidBlock2D) and
`models/attention_processor.py` (Attention).
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.vae_layers import AFTER, ALL, ONE_AROUND, attend_within_frames, conv, doubled
from qvdjax.nn import Conv, GroupNorm, Linear

EPSILON = 1e-6
_SQUARE = {"kernel": (3, 3), "padding": ONE_AROUND}


class ResnetBlock(nnx.Module):
    """Norm, SiLU and convolution, twice; added to the input."""

    def __init__(self, features: int, width: int, *, groups: int, rngs: nnx.Rngs, dtype):
        make = functools.partial(conv, rngs=rngs, dtype=dtype)
        self.norm1, self.norm2 = (GroupNorm(c, groups, epsilon=EPSILON, dtype=dtype) for c in (features, width))
        self.conv1, self.conv2 = make(features, width, **_SQUARE), make(width, width, **_SQUARE)
        self.conv_shortcut = None if features == width else make(features, width, (1, 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images with `features` channels -> images with `width` channels."""
        inner = self.conv1(jax.nn.silu(self.norm1(x)).astype(x.dtype))
        inner = self.conv2(jax.nn.silu(self.norm2(inner)).astype(x.dtype))
        return inner + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class AttentionBlock(nnx.Module):
    """Norm and attention of one head among an image's positions; added to the input."""

    def __init__(self, width: int, *, groups: int, rngs: nnx.Rngs, dtype):
        self.group_norm = GroupNorm(width, groups, epsilon=EPSILON, dtype=dtype)
        make = lambda role: Linear(width, width, role=role, axes=ALL, key=rngs.params(), dtype=dtype)  # noqa: E731
        self.to_q, self.to_k, self.to_v = make("query"), make("key"), make("value")
        self.to_out = nnx.Dict({"0": make("attention_output")})

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> the same shape."""
        inner = self.group_norm(x).astype(x.dtype)
        return x + self.to_out["0"](attend_within_frames(self.to_q(inner), self.to_k(inner), self.to_v(inner)))


class MidBlock(nnx.Module):
    """ResNet block, attention where there is one, ResNet block."""

    def __init__(self, width: int, *, groups: int, attention: bool, rngs: nnx.Rngs, dtype):
        made = {"groups": groups, "rngs": rngs, "dtype": dtype}
        self.attentions = nnx.List([AttentionBlock(width, **made)] if attention else [])
        self.resnets = nnx.List([ResnetBlock(width, width, **made) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> the same shape."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class DownBlock(nnx.Module):
    """ResNet blocks, and a convolution that halves height and width."""

    def __init__(self, features: int, width: int, layers: int, *, last: bool, groups: int, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        made = {"rngs": rngs, "dtype": dtype}
        self.resnets = nnx.List([ResnetBlock(entry, width, groups=groups, **made) for entry in entries])
        halve = None if last else conv(width, width, (3, 3), stride=(2, 2), padding=AFTER, **made)
        self.downsamplers = None if halve is None else nnx.List([nnx.Dict({"conv": halve})])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> images of half the sides; of the same, in the last block."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.downsamplers is None else self.downsamplers[0]["conv"](x)


def upsampler(width: int, *, rngs: nnx.Rngs, dtype) -> nnx.List:
    """The convolution of `upsample`, under its name in diffusers: `0.conv`."""
    return nnx.List([nnx.Dict({"conv": conv(width, width, **_SQUARE, rngs=rngs, dtype=dtype)})])


def upsample(upsamplers: nnx.List, x: jax.Array) -> jax.Array:
    """Images -> images of twice the sides."""
    return upsamplers[0]["conv"](doubled(x))


class UpBlock(nnx.Module):
    """ResNet blocks, and a convolution behind doubled height and width."""

    def __init__(self, features: int, width: int, layers: int, *, last: bool, groups: int, rngs: nnx.Rngs, dtype):
        entries = (features, *[width] * (layers - 1))
        made = {"rngs": rngs, "dtype": dtype}
        self.resnets = nnx.List([ResnetBlock(entry, width, groups=groups, **made) for entry in entries])
        self.upsamplers = None if last else upsampler(width, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> images of twice the sides; of the same, in the last block."""
        for resnet in self.resnets:
            x = resnet(x)
        return x if self.upsamplers is None else upsample(self.upsamplers, x)


class Encoder(nnx.Module):
    """Images -> what the moments of their latents are made of, 2 x `latents` channels."""

    def __init__(
        self, channels: int, latents: int, widths: Sequence[int], layers: int, *, groups: int, attention: bool = True,
        rngs: nnx.Rngs, dtype,
    ):  # fmt: skip
        made = {"rngs": rngs, "dtype": dtype}
        self.conv_in = conv(channels, widths[0], **_SQUARE, **made)
        entries = (widths[0], *widths[:-1])
        self.down_blocks = nnx.List([
            DownBlock(entry, width, layers, last=level == len(widths) - 1, groups=groups, **made)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ])  # fmt: skip
        self.mid_block = MidBlock(widths[-1], groups=groups, attention=attention, **made)
        self.conv_norm_out = GroupNorm(widths[-1], groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], 2 * latents, **_SQUARE, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images -> (frames, height', width', 2 x latents)."""
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return finished(self.conv_norm_out, self.conv_out, self.mid_block(x))


class Decoder(nnx.Module):
    """Latents of images -> images."""

    def __init__(
        self, latents: int, channels: int, widths: Sequence[int], layers: int, *, groups: int, attention: bool = True,
        rngs: nnx.Rngs, dtype,
    ):  # fmt: skip
        made = {"rngs": rngs, "dtype": dtype}
        widths = widths[::-1]
        self.conv_in = conv(latents, widths[0], **_SQUARE, **made)
        self.mid_block = MidBlock(widths[0], groups=groups, attention=attention, **made)
        entries = (widths[0], *widths[:-1])
        self.up_blocks = nnx.List([
            UpBlock(entry, width, layers + 1, last=level == len(widths) - 1, groups=groups, **made)
            for level, (entry, width) in enumerate(zip(entries, widths, strict=True))
        ])  # fmt: skip
        self.conv_norm_out = GroupNorm(widths[-1], groups, epsilon=EPSILON, dtype=dtype)
        self.conv_out = conv(widths[-1], channels, **_SQUARE, **made)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(frames, height, width, latents) -> images."""
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return finished(self.conv_norm_out, self.conv_out, x)


def finished(norm: GroupNorm, conv_out: Conv, x: jax.Array) -> jax.Array:
    """Norm, SiLU and the last convolution of an encoder or a decoder."""
    return conv_out(jax.nn.silu(norm(x)).astype(x.dtype))


def frames_in_chunks(run: Callable[[jax.Array], jax.Array], x: jax.Array, at_once: int) -> jax.Array:
    """Apply a network of images to `at_once` frames of all videos at a time.

    Args:
        run: (frames, height, width, channels) -> (frames, height', width', channels').
        x: (batch, frames, height, width, channels).
        at_once: At least 1. The last chunk may be shorter.

    Returns:
        (batch, frames, height', width', channels').
    """
    images = rearrange(x, "b f h w c -> (b f) h w c")
    whole = len(images) // at_once * at_once
    parts = []
    if whole:
        chunks = rearrange(images[:whole], "(n f) h w c -> n f h w c", f=at_once)
        parts.append(rearrange(jax.lax.map(run, chunks), "n f h w c -> (n f) h w c"))
    if whole < len(images):
        parts.append(run(images[whole:]))
    return rearrange(jnp.concatenate(parts), "(b f) h w c -> b f h w c", b=x.shape[0])
