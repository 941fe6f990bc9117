"""The blocks of the video UNet, over a stream that is the sample and the skip connections that are still open.

One block is one layer of a level: ResNet, spatial transformer and motion module, and behind a level's last layer the
convolution to the next resolution. So each block of the way down leaves what the way up reads, and each block of the
way up takes one skip connection. diffusers' own `down_blocks.0` holds two or three such layers; as single blocks they
are what reconstruction of quantized UNets takes one after the other (BRECQ's and Q-Diffusion's blocks), they need a
half to a third of the memory when a block is recomputed or its input is kept, and a recipe may treat them each in its
own way. Names stay diffusers': a block is called `down_blocks.0` and has its parts under their numbers.

Read in diffusers 0.42 `models/unets/unet_motion_model.py`, `models/resnet.py`, `models/upsampling.py` and
`models/downsampling.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

from models.unet_motion_config import UNetMotionConfig
from models.unet_transformers import MotionModule, SpatialTransformer, per_frame
from qvdjax.nn import Conv, GroupNorm, Linear
from qvdjax.parallel.rules import constrain

ONE_AROUND = ((1, 1), (1, 1))  # padding of every convolution of 3 x 3


@functools.partial(jax.tree_util.register_dataclass, data_fields=["sample", "skips"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UNetStream:
    """What the blocks change.

    Attributes:
        sample: (batch, frames, height, width, channels), at the resolution of the last block.
        skips: Like it, of the way down, those that the way up has not read yet; the last is read first.
    """

    sample: jax.Array
    skips: tuple[jax.Array, ...]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["time_embedding", "context"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class UNetConditioning:
    """What the blocks read.

    Attributes:
        time_embedding: (batch, time_dim); each ResNet block applies its own SiLU to it.
        context: (batch, text tokens, text_dim), the same text for all frames of a video.
    """

    time_embedding: jax.Array
    context: jax.Array


def normalised(norm: GroupNorm, x: jax.Array, *, joint: bool) -> jax.Array:
    """SiLU of the group norm of x (batch, frames, height, width, channels), over all frames or each on its own."""
    return jax.nn.silu(norm(x) if joint else per_frame(norm, x)).astype(x.dtype)


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, the timestep added, norm, SiLU, convolution; added to the input."""

    def __init__(self, config: UNetMotionConfig, channels: int, width: int, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        norm = functools.partial(GroupNorm, groups=config.norm_num_groups, epsilon=config.norm_eps, dtype=dtype)
        conv = functools.partial(Conv, role="convolution", dtype=dtype)
        across, back = ("mlp", "embed"), ("embed", "mlp")
        self.norm1, self.norm2 = norm(channels), norm(width, axis="mlp")
        self.conv1 = conv(channels, width, (3, 3), padding=ONE_AROUND, axes=across, key=keys[0])
        self.time_emb_proj = Linear(
            config.time_dim, width, role="temporal_feature", axes=across, key=keys[1], dtype=dtype
        )
        self.conv2 = conv(width, width, (3, 3), padding=ONE_AROUND, axes=back, key=keys[2])
        shortcut = functools.partial(conv, channels, width, (1, 1), axes=("embed", None), key=keys[3])
        self.conv_shortcut = None if channels == width else shortcut()
        self.joint = config.resnet_group_norm == "joint"

    def __call__(self, x: jax.Array, time_embedding: jax.Array) -> jax.Array:
        """x (batch, frames, height, width, channels), (batch, time_dim) -> like x with `width` channels."""
        inner = per_frame(self.conv1, normalised(self.norm1, x, joint=self.joint))
        shift = self.time_emb_proj(jax.nn.silu(time_embedding))  # (batch, width), the same for all frames
        inner = inner + shift[:, None, None, None, :]  # b c -> b 1 1 1 c
        inner = per_frame(self.conv2, normalised(self.norm2, inner, joint=self.joint))
        return inner + (x if self.conv_shortcut is None else per_frame(self.conv_shortcut, x))


class _Layer(nnx.Module):
    """ResNet, spatial transformer where the level has one, and motion module, all under the layer's number.

    Attributes:
        number: Of the layer in its level.
    """

    def __init__(
        self, config: UNetMotionConfig, number: int, channels: int, width: int, *, attends: bool, resamples: str | None,
        key: jax.Array, dtype,
    ):  # fmt: skip
        """`channels` come in and `width` go out; `resamples` names the convolution to the next level."""
        keys, name, options = jax.random.split(key, 4), str(number), {"dtype": dtype}
        self.resnets = nnx.Dict({name: ResnetBlock(config, channels, width, key=keys[0], **options)})
        transformer = functools.partial(SpatialTransformer, config, width, key=keys[1], **options)
        self.attentions = nnx.Dict({name: transformer()}) if attends else None
        self.motion_modules = nnx.Dict({name: MotionModule(config, width, key=keys[2], **options)})
        if resamples is not None:
            stride = (2, 2) if resamples == "downsamplers" else (1, 1)
            conv = Conv(
                width, width, (3, 3), stride=stride, padding=ONE_AROUND, role="convolution", axes=("embed", None),
                key=keys[3], dtype=dtype,
            )  # fmt: skip
            setattr(self, resamples, nnx.Dict({"0": nnx.Dict({"conv": conv})}))
        self.number, self.resamples = name, resamples is not None

    def layer(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> like x with the layer's width."""
        x = _split_batch(self.resnets[self.number](x, conditioning.time_embedding))
        if self.attentions is not None:
            x = self.attentions[self.number](x, conditioning.context)
        return _split_batch(self.motion_modules[self.number](x))


class DownBlock(_Layer):
    """A layer of the way down: opens a skip connection, and at the end of a level, behind the convolution, another."""

    def __call__(self, stream: UNetStream, conditioning: UNetConditioning) -> UNetStream:
        """Changes the sample and opens one or two skip connections."""
        sample = self.layer(stream.sample, conditioning)
        skips = (*stream.skips, sample)
        if self.resamples:
            sample = per_frame(self.downsamplers["0"]["conv"], sample)
            skips = (*skips, sample)
        return UNetStream(sample, skips)


class MidBlock(nnx.Module):
    """ResNet, spatial transformer, motion module where the version has one, ResNet, at the lowest resolution."""

    def __init__(self, config: UNetMotionConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        width, options = config.block_out_channels[-1], {"dtype": dtype}
        resnet = functools.partial(ResnetBlock, config, width, width, **options)
        self.resnets = nnx.Dict({"0": resnet(key=keys[0]), "1": resnet(key=keys[1])})
        self.attentions = nnx.Dict({"0": SpatialTransformer(config, width, key=keys[2], **options)})
        motion = functools.partial(MotionModule, config, width, key=keys[3], **options)
        self.motion_modules = nnx.Dict({"0": motion()}) if config.use_motion_mid_block else None

    def __call__(self, stream: UNetStream, conditioning: UNetConditioning) -> UNetStream:
        """Changes the sample alone."""
        x = self.resnets["0"](_split_batch(stream.sample), conditioning.time_embedding)
        x = self.attentions["0"](x, conditioning.context)
        if self.motion_modules is not None:
            x = self.motion_modules["0"](x)
        return UNetStream(self.resnets["1"](x, conditioning.time_embedding), stream.skips)


class UpBlock(_Layer):
    """A layer of the way up: closes a skip connection; at the end of a level it doubles the resolution."""

    def __call__(self, stream: UNetStream, conditioning: UNetConditioning) -> UNetStream:
        """Changes the sample and closes one skip connection."""
        *skips, last = stream.skips
        sample = self.layer(jnp.concatenate([stream.sample, last], axis=-1), conditioning)
        if self.resamples:
            doubled = repeat(sample, "b f h w c -> b f (h two) (w too) c", two=2, too=2)  # to the nearest
            sample = per_frame(self.upsamplers["0"]["conv"], doubled)
        return UNetStream(sample, tuple(skips))


def _split_batch(x: jax.Array) -> jax.Array:
    """On a mesh videos lie apart, and all of a video together: its convolutions and motion modules need neighbours."""
    return constrain(x, "batch", None, None, None, None)
