"""The two transformers inside a layer of a video UNet: over the positions of a frame, and over the frames.

Read in diffusers 0.42 `models/transformers/transformer_2d.py`, `models/unets/unet_motion_model.py`
(AnimateDiffTransformer3D), `models/transformers/transformer_temporal.py` (TransformerTemporalModel) and
`models/attention.py` (BasicTransformerBlock).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx

from models.blocks import merge_heads, split_heads
from models.unet_stream import UNetConditioning, per_frame
from qvdjax.nn import Attention, Buffer, Conv, FrameAxis, GroupNorm, LayerNorm, Linear

EPSILON = 1e-6  # of both transformers' group norms, whatever `norm_eps` says


class UNetAttention(nnx.Module):
    """Attention of a token to others of its sequence, or to those of a context; only the output has a bias.

    `frame_axis` and `context_frame_axis` say where the frames of a video lie in both.
    """

    def __init__(
        self, width: int, heads: int, context: int, *, frame_axis: FrameAxis | None = None,
        context_frame_axis: FrameAxis | None = None, key: jax.Array, dtype,
    ):  # fmt: skip
        keys = jax.random.split(key, 4)
        across = {"axes": ("heads", "embed"), "dtype": dtype, "bias": False}
        self.to_q = Linear(width, width, role="query", key=keys[0], frame_axis=frame_axis, **across)
        self.to_k = Linear(context, width, role="key", key=keys[1], frame_axis=context_frame_axis, **across)
        self.to_v = Linear(context, width, role="value", key=keys[2], frame_axis=context_frame_axis, **across)
        back = {"axes": ("embed", "heads"), "frame_axis": frame_axis, "dtype": dtype}
        self.to_out = nnx.Dict({"0": Linear(width, width, role="attention_output", key=keys[3], **back)})
        self.attention = Attention(keys="context")  # tokens of a frame, a place or a text: never the whole stream
        self.heads = heads

    def __call__(self, x: jax.Array, context: jax.Array, lengths: jax.Array | None = None) -> jax.Array:
        """x (batch, tokens, width) attends to context (batch, keys, its width), or to the first `lengths` (batch,)."""
        query, key, value = (split_heads(a, self.heads) for a in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out["0"](merge_heads(self.attention(query, key, value, lengths)))


class GatedFeedForward(nnx.Module):
    """Linear to values and gates, values times the exact GELU of gates, Linear (diffusers' GEGLU)."""

    def __init__(self, width: int, *, frame_axis: FrameAxis | None = None, key: jax.Array, dtype):
        up, down = jax.random.split(key)
        hidden, shared = 4 * width, {"frame_axis": frame_axis, "dtype": dtype}
        wide = Linear(width, 2 * hidden, role="feed_forward_in", axes=("mlp", "embed"), key=up, **shared)
        narrow = Linear(hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=down, **shared)
        self.net = nnx.Dict({"0": nnx.Dict({"proj": wide}), "2": narrow})

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, width) -> the same."""
        value, gate = jnp.split(self.net["0"]["proj"](x), 2, axis=-1)
        return self.net["2"](value * jax.nn.gelu(gate, approximate=False))


class _Block(nnx.Module):
    """Three norms, two attentions and a feed-forward; `frame_axes` says where frames lie in the inputs of these."""

    def __init__(
        self, width: int, heads: int, context: int, *, frame_axes: tuple[FrameAxis | None, ...] = (None,) * 3,
        key: jax.Array, dtype,
    ):  # fmt: skip
        keys, (own, other, feed_forward) = jax.random.split(key, 3), frame_axes
        norm = functools.partial(LayerNorm, width, epsilon=1e-5, affine=True, dtype=dtype)
        self.norm1, self.norm2, self.norm3 = norm(), norm(), norm()
        places = {"frame_axis": own, "context_frame_axis": own}
        self.attn1 = UNetAttention(width, heads, width, **places, key=keys[0], dtype=dtype)
        self.attn2 = UNetAttention(width, heads, context, frame_axis=other, key=keys[1], dtype=dtype)
        self.ff = GatedFeedForward(width, frame_axis=feed_forward, key=keys[2], dtype=dtype)


class SpatialBlock(_Block):
    """Attention within each frame, attention to the text, feed-forward."""

    def __init__(self, width: int, heads: int, context: int, *, key: jax.Array, dtype):
        super().__init__(width, heads, context, frame_axes=(0, 1, 1), key=key, dtype=dtype)

    def __call__(
        self, x: jax.Array, context: jax.Array, reference: jax.Array | None = None, seen: jax.Array | None = None
    ) -> jax.Array:
        """x (batch, frames, positions, width) -> the same; context (batch, text tokens, text_dim). Frames also attend
        to the reference (batch, tokens, width), of those videos for which `seen` (batch,) is true, or of all."""
        batch, count, positions, _ = x.shape
        frames = rearrange(self.norm1(x).astype(x.dtype), "b f p c -> (b f) p c")
        keys, lengths = frames, None
        if reference is not None:
            keys = jnp.concatenate([frames, repeat(reference, "b t c -> (b f) t c", f=count)], axis=1)
            if seen is not None:
                lengths = repeat(jnp.where(seen, keys.shape[1], positions), "b -> (b f)", f=count)
        x = x + rearrange(self.attn1(frames, keys, lengths), "(b f) p c -> b f p c", b=batch)
        # All frames of a video see the same text, so they are queries of one attention; nothing is repeated.
        video = rearrange(self.norm2(x).astype(x.dtype), "b f p c -> b (f p) c")
        x = x + self.attn2(video, context).reshape(x.shape)  # b (f p) c -> b f p c
        return x + self.ff(self.norm3(x).astype(x.dtype))


class PositionTable(nnx.Module):
    """Sines (even features) and cosines (odd ones) of positions, `pe` (1, positions, width)."""

    def __init__(self, positions: int, width: int, *, dtype):
        frequencies = 10000.0 ** -(np.arange(0, width, 2) / width)
        angles = np.arange(positions)[:, None] * frequencies  # (positions, width / 2)
        pairs = np.stack([np.sin(angles), np.cos(angles)], axis=-1)
        table = pairs.reshape(1, positions, width)  # (positions, width / 2, 2) -> (1, positions, width)
        self.pe = Buffer(jnp.asarray(table, dtype), axes=(None, None, "embed"))


def batched(attention: UNetAttention) -> UNetAttention:
    """For sequences of some 16 frames, thousands of them: one batched product everywhere. Kernels of flash attention
    are made for long sequences, and one after the other these would take a CPU for ever."""
    attention.attention.implementation = "xla"
    return attention


class TemporalBlock(_Block):
    """Attention over the frames of a position, twice, and feed-forward.

    Where there is a table of positions, attention alone sees it.
    """

    def __init__(self, width: int, heads: int, positions: int | None, *, key: jax.Array, dtype):
        super().__init__(width, heads, width, key=key, dtype=dtype)
        self.pos_embed = None if positions is None else PositionTable(positions, width, dtype=dtype)
        batched(self.attn1), batched(self.attn2)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (sequences, frames, width) -> the same."""
        for norm, attention in ((self.norm1, self.attn1), (self.norm2, self.attn2)):
            placed = norm(x)
            if self.pos_embed is not None:
                table = self.pos_embed.pe[...][:, : x.shape[1]]  # (1, frames, width)
                placed = placed + table.astype(placed.dtype)
            placed = placed.astype(x.dtype)
            x = x + attention(placed, placed)
        return x + self.ff(self.norm3(x).astype(x.dtype))


class SpatialTransformer(nnx.Module):
    """Group norm, projection, a SpatialBlock, projection, and the input added; the norm is over one frame.

    Args:
        width: Channels of the stream, and features inside.
        heads: Attention heads.
        context: Features of the text.
        groups: Of the norm.
        linear: Whether projections are linear layers.
    """

    def __init__(self, width: int, heads: int, context: int, groups: int, *, linear: bool, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        self.norm = GroupNorm(width, groups, epsilon=EPSILON, dtype=dtype)
        self.transformer_blocks = nnx.Dict({"0": SpatialBlock(width, heads, context, key=keys[0], dtype=dtype)})
        shared = {"linear": linear, "frame_axis": 0, "dtype": dtype}
        self.proj_in, self.proj_out = (projection(width, width, key=k, **shared) for k in keys[1:])

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        inner = per_frame(self.proj_in, per_frame(self.norm, x).astype(x.dtype))
        tokens = rearrange(inner, "b f h w c -> b f (h w) c")
        seen = conditioning.reference, conditioning.reference_seen
        tokens = self.transformer_blocks["0"](tokens, conditioning.context, *seen)
        return x + per_frame(self.proj_out, tokens.reshape(x.shape))  # b f (h w) c -> b f h w c


def projection(
    channels: int, width: int, *, linear: bool, frame_axis: FrameAxis | None = None, key: jax.Array, dtype
) -> Linear | Conv:
    """Between the stream and a transformer: a linear layer, or as checkpoints of SD 1.5 have it a 1 x 1 convolution."""
    common = {"axes": ("embed", None), "frame_axis": frame_axis, "key": key, "dtype": dtype}
    if linear:
        return Linear(channels, width, role="projection", **common)
    return Conv(channels, width, (1, 1), role="convolution", **common)


class TemporalTransformer(nnx.Module):
    """Group norm, projection, a TemporalBlock over the frames of each position, projection, and the input added.

    Args:
        channels: Of the stream.
        width: Features inside.
        heads: Attention heads.
        groups: Of the norm.
        positions: Frames that the table of positions has; None for no table.
        joint: Whether the norm takes mean and variance over all frames; otherwise over each on its own.
    """

    def __init__(
        self, channels: int, width: int, heads: int, groups: int, *, positions: int | None = None, joint: bool = True,
        key: jax.Array, dtype,
    ):  # fmt: skip
        keys = jax.random.split(key, 3)
        self.norm = GroupNorm(channels, groups, epsilon=EPSILON, dtype=dtype)
        self.transformer_blocks = nnx.Dict({"0": TemporalBlock(width, heads, positions, key=keys[0], dtype=dtype)})
        self.proj_in = projection(channels, width, linear=True, key=keys[1], dtype=dtype)
        self.proj_out = projection(width, channels, linear=True, key=keys[2], dtype=dtype)
        self.joint = joint

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same; nothing of the conditioning is read."""
        batch, _, height, _, _ = x.shape
        normalised = (self.norm(x) if self.joint else per_frame(self.norm, x)).astype(x.dtype)
        inner = self.proj_in(rearrange(normalised, "b f h w c -> (b h w) f c"))
        inner = self.proj_out(self.transformer_blocks["0"](inner))
        return x + rearrange(inner, "(b h w) f c -> b f h w c", b=batch, h=height)
