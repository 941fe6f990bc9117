"""The blocks of a video UNet, over a stream that is the sample and the skip connections that are still open.

One block is one layer of a level: ResNet, transformers and what else a family has, and behind a level's last layer the
convolution to the next resolution. So each block of the way down leaves what the way up reads, and each block of the
way up takes one skip connection. diffusers' own `down_blocks.0` holds two or three such layers; as single blocks they
are what reconstruction of quantized UNets takes one after the other (BRECQ's and Q-Diffusion's blocks), they need a
half to a third of the memory when a block is recomputed or its input is kept, and a recipe may treat them each in its
own way. Names stay diffusers': a block is called `down_blocks.0` and has its parts under their numbers.

Read in diffusers 0.42 `models/unets/unet_motion_model.py`, `models/unets/unet_3d_blocks.py`, `models/resnet.py`,
`models/upsampling.py` and `models/downsampling.py`.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from einops import repeat
from flax import nnx

from models.unet_stream import UNetConditioning, UNetStream, normalised, per_frame
from qvdjax.nn import Conv, GroupNorm, Linear, PartialBlock
from qvdjax.nn.variables import shallow_copy
from qvdjax.parallel.rules import constrain

ONE_AROUND = ((1, 1), (1, 1))  # padding of every convolution of 3 x 3
ALONG_FRAMES = {"kernel": (3, 1, 1), "padding": ((1, 1), (0, 0), (0, 0))}  # a frame and its two neighbours
Parts = Sequence[tuple[str, str, nnx.Module]]
"""(name of the group, number in it, module), in the order in which they are applied. A module takes a sample (batch,
frames, height, width, channels) and the conditioning, and returns a sample."""


class ResnetBlock(nnx.Module):
    """Norm, SiLU, convolution, the timestep added, norm, SiLU, convolution; added to the input.

    Args:
        channels, width: Channels that come in and go out.
        time_dim: Features of the time embedding.
        groups, epsilon: Of the norms.
        joint: Whether norms take mean and variance over all frames; otherwise over each on its own.
        along_frames: Whether convolutions mix a position's neighbouring frames; otherwise a frame's neighbouring
            positions.
        parts: Channels of each array that the input is made of, None for one.
    """

    def __init__(
        self, channels: int, width: int, time_dim: int, *, groups: int, epsilon: float, joint: bool = False,
        along_frames: bool = False, parts: tuple[int, ...] | None = None, key: jax.Array, dtype,
    ):  # fmt: skip
        keys = jax.random.split(key, 4)
        mixes = ALONG_FRAMES if along_frames else {"kernel": (3, 3), "padding": ONE_AROUND}
        norm = functools.partial(GroupNorm, groups=groups, epsilon=epsilon, dtype=dtype)
        conv = functools.partial(Conv, role="convolution", frame_axis=None if along_frames else 0, dtype=dtype)
        across, back = ("mlp", "embed"), ("embed", "mlp")
        self.norm1, self.norm2 = norm(channels), norm(width, axis="mlp")
        self.conv1 = conv(channels, width, **mixes, axes=across, parts=parts, key=keys[0])
        self.time_emb_proj = Linear(time_dim, width, role="temporal_feature", axes=across, key=keys[1], dtype=dtype)
        self.conv2 = conv(width, width, **mixes, axes=back, key=keys[2])
        shortcut = functools.partial(conv, channels, width, (1, 1), axes=("embed", None), parts=parts, key=keys[3])
        self.conv_shortcut = None if channels == width else shortcut()
        self.joint, self.along_frames = joint, along_frames

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> like x with `width` channels."""
        inner = self._convolve(self.conv1, normalised(self.norm1, x, joint=self.joint))
        # (batch, width), the same for all frames
        shift = self.time_emb_proj(jax.nn.silu(conditioning.time_embedding))
        inner = inner + shift[:, None, None, None, :]  # b c -> b 1 1 1 c
        inner = self._convolve(self.conv2, normalised(self.norm2, inner, joint=self.joint))
        return inner + (x if self.conv_shortcut is None else per_frame(self.conv_shortcut, x))

    def _convolve(self, conv: Conv, x: jax.Array) -> jax.Array:
        return conv(x) if self.along_frames else per_frame(conv, x)


class _Layer(PartialBlock):
    """Parts one after the other, each under its group's name and its number.

    Attributes:
        order: (group, number) of each part.
    """

    def __init__(self, parts: Parts):
        groups = {}
        for group, number, part in parts:
            groups.setdefault(group, {})[number] = part
        for group, members in groups.items():
            setattr(self, group, nnx.Dict(members))
        self.order = tuple((group, number) for group, number, _ in parts)

    def layer(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> like x with the layer's width."""
        x = split_batch(x)
        for group, number in self.order:
            x = split_batch(getattr(self, group)[number](x, conditioning))
        return x

    def read(self, stream: UNetStream) -> tuple[jax.Array, ...]:
        """The sample."""
        return (stream.sample,)

    def unplaced(self) -> tuple["_Layer", dict[tuple, tuple]]:
        """The layer with the parts of each group numbered from 0."""
        block, moved = shallow_copy(self), {}
        for group in dict.fromkeys(group for group, _ in self.order):
            numbers = [number for own, number in self.order if own == group]
            members = getattr(self, group)
            moved |= {(group, str(i)): (group, number) for i, number in enumerate(numbers)}
            setattr(block, group, nnx.Dict({str(i): members[number] for i, number in enumerate(numbers)}))
        here = {old: new for new, old in moved.items()}
        block.order = tuple(here[place] for place in self.order)
        return block, moved


class DownBlock(_Layer):
    """A layer of the way down: opens a skip connection, and at the end of a level, behind the convolution, another."""

    def __init__(self, parts: Parts, width: int, *, resamples: bool, key: jax.Array, dtype):
        super().__init__(parts)
        conv = _resampler(width, (2, 2), key, dtype) if resamples else None
        self.downsamplers = None if conv is None else nnx.Dict({"0": nnx.Dict({"conv": conv})})

    def make(self, part: tuple[jax.Array, ...], conditioning: UNetConditioning) -> tuple[jax.Array, ...]:
        """The sample; behind a downsampling both, the lower resolution first."""
        sample = self.layer(*part, conditioning)
        if self.downsamplers is None:
            return (sample,)
        return per_frame(self.downsamplers["0"]["conv"], sample), sample

    def put(self, stream: UNetStream, made: tuple[jax.Array, ...]) -> UNetStream:
        """Changes the sample and opens one or two skip connections, the highest resolution first."""
        return stream.opened(made[0], *reversed(made))


class MidBlock(_Layer):
    """What is done at the lowest resolution, between the two ways."""

    def read(self, stream: UNetStream) -> tuple[jax.Array, ...]:
        """The sample, and the tokens of a reference image where there is one."""
        return stream.sample, *stream.references[:1]

    def make(self, part: tuple[jax.Array, ...], conditioning: UNetConditioning) -> tuple[jax.Array, ...]:
        """The sample."""
        sample, *reference = part
        return (self.layer(sample, _referring(conditioning, reference)),)

    def put(self, stream: UNetStream, made: tuple[jax.Array, ...]) -> UNetStream:
        """Changes the sample alone."""
        (sample,) = made
        if stream.middle is not None:
            sample = sample + stream.middle.astype(sample.dtype)
        return dataclasses.replace(stream, sample=sample, middle=None, references=stream.references[1:])


class UpBlock(_Layer):
    """A layer of the way up: closes a skip connection; at the end of a level it doubles the resolution."""

    def __init__(self, parts: Parts, width: int, *, resamples: bool, key: jax.Array, dtype):
        super().__init__(parts)
        conv = _resampler(width, (1, 1), key, dtype) if resamples else None
        self.upsamplers = None if conv is None else nnx.Dict({"0": nnx.Dict({"conv": conv})})

    def read(self, stream: UNetStream) -> tuple[jax.Array, ...]:
        """The sample and the last skip connection; where it attends, a reference image's tokens if there is one."""
        return stream.sample, stream.skips[-1], *stream.references[: self._attends]

    def make(self, part: tuple[jax.Array, ...], conditioning: UNetConditioning) -> tuple[jax.Array, ...]:
        """The sample."""
        sample, skip, *reference = part
        both = jnp.concatenate([sample, skip], axis=-1)
        sample = self.layer(both, _referring(conditioning, reference))
        if self.upsamplers is not None:
            doubled = repeat(sample, "b f h w c -> b f (h two) (w too) c", two=2, too=2)  # to the nearest
            sample = per_frame(self.upsamplers["0"]["conv"], doubled)
        return (sample,)

    def put(self, stream: UNetStream, made: tuple[jax.Array, ...]) -> UNetStream:
        """Changes the sample and closes one skip connection."""
        (sample,) = made
        rest = stream.references[self._attends :]
        return dataclasses.replace(stream, sample=sample, skips=stream.skips[:-1], references=rest)

    @property
    def _attends(self) -> int:
        """How many self-attentions over the tokens of a frame it has: one or none."""
        return int(hasattr(self, "attentions"))


def _referring(conditioning: UNetConditioning, reference: list[jax.Array]) -> UNetConditioning:
    """The conditioning of a block that sees these tokens of a reference image, one array or none."""
    return dataclasses.replace(conditioning, reference=reference[0]) if reference else conditioning


def _resampler(width: int, stride: tuple[int, int], key: jax.Array, dtype) -> Conv:
    return Conv(
        width, width, (3, 3), stride=stride, padding=ONE_AROUND, role="convolution", axes=("embed", None),
        frame_axis=0, key=key, dtype=dtype,
    )  # fmt: skip


def split_batch(x: jax.Array) -> jax.Array:
    """On a mesh videos lie apart, and all of a video together: its convolutions and temporal layers need neighbours."""
    return constrain(x, "batch", None, None, None, None)
