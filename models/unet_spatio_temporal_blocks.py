"""The parts of Stable Video Diffusion's blocks: each does something in every frame, then over frames, and blends both.

Read in diffusers 0.42 `models/resnet.py` (SpatioTemporalResBlock, TemporalResnetBlock, AlphaBlender),
`models/transformers/transformer_temporal.py` (TransformerSpatioTemporalModel) and `models/attention.py`
(TemporalBasicTransformerBlock).
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.blocks import TimestepEmbedding
from models.unet_blocks import ResnetBlock
from models.unet_stream import UNetConditioning, per_frame
from models.unet_transformers import (
    EPSILON,
    GatedFeedForward,
    SpatialBlock,
    UNetAttention,
    batched,
    projection,
)
from qvdjax.nn import GroupNorm, LayerNorm
from qvdjax.nn.norm import at_least_float32
from qvdjax.nn.variables import Param


class Blend(nnx.Module):
    """a x spatial + (1 - a) x temporal; a is the sigmoid of a learned number, `mix_factor` (1,)."""

    def __init__(self, *, dtype):
        self.mix_factor = Param(jnp.full((1,), 0.5, dtype), axes=(None,), keep_float32=True)

    def __call__(self, spatial: jax.Array, temporal: jax.Array) -> jax.Array:
        """Two arrays of one shape -> the same."""
        share = jax.nn.sigmoid(at_least_float32(self.mix_factor[...])).astype(spatial.dtype)
        return share * spatial + (1 - share) * temporal


class SpatioTemporalResnet(nnx.Module):
    """A ResNet in every frame, one along frames on top of it, and both blended."""

    def __init__(
        self, channels: int, width: int, time_dim: int, *, groups: int, epsilon: float,
        parts: tuple[int, ...] | None = None, key: jax.Array, dtype,
    ):  # fmt: skip
        """As `ResnetBlock` takes them."""
        first, second = jax.random.split(key)
        options = {"groups": groups, "epsilon": epsilon, "dtype": dtype}
        self.spatial_res_block = ResnetBlock(channels, width, time_dim, parts=parts, key=first, **options)
        self.temporal_res_block = ResnetBlock(
            width, width, time_dim, joint=True, along_frames=True, key=second, **options
        )
        self.time_mixer = Blend(dtype=dtype)

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> like x with `width` channels."""
        spatial = self.spatial_res_block(x, conditioning)
        return self.time_mixer(spatial, self.temporal_res_block(spatial, conditioning))


class CrossTemporalBlock(nnx.Module):
    """Feed-forward, attention over the frames of a position, attention to the context, feed-forward."""

    def __init__(self, width: int, heads: int, context: int, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        norms = [LayerNorm(width, epsilon=1e-5, affine=True, dtype=dtype) for _ in range(4)]
        self.norm_in, self.norm1, self.norm2, self.norm3 = norms
        self.ff_in = GatedFeedForward(width, key=keys[0], dtype=dtype)
        self.attn1 = batched(UNetAttention(width, heads, width, key=keys[1], dtype=dtype))
        self.attn2 = UNetAttention(width, heads, context, key=keys[2], dtype=dtype)
        self.ff = GatedFeedForward(width, key=keys[3], dtype=dtype)

    def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
        """x (batch, frames, positions, width) -> the same; context (batch, tokens, its width)."""
        shape, dtype = x.shape, x.dtype
        x = x + self.ff_in(self.norm_in(x).astype(dtype))
        places = rearrange(self.norm1(x).astype(dtype), "b f p c -> (b p) f c")
        x = x + rearrange(self.attn1(places, places), "(b p) f c -> b f p c", b=shape[0])
        # Everything in a video sees the same context, so all are queries of one attention.
        video = rearrange(self.norm2(x).astype(dtype), "b f p c -> b (f p) c")
        x = x + self.attn2(video, context).reshape(shape)  # b (f p) c -> b f p c
        return x + self.ff(self.norm3(x).astype(dtype))


class SpatioTemporalTransformer(nnx.Module):
    """Group norm over a frame, projection, a SpatialBlock, on top of it with the number of the frame a
    CrossTemporalBlock, both blended, projection, and the input added."""

    def __init__(self, width: int, heads: int, context: int, groups: int, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 5)
        self.norm = GroupNorm(width, groups, epsilon=EPSILON, dtype=dtype)
        shared = {"linear": True, "frame_axis": 1, "dtype": dtype}
        self.proj_in, self.proj_out = (projection(width, width, key=k, **shared) for k in keys[:2])
        spatial = SpatialBlock(width, heads, context, key=keys[2], dtype=dtype)
        temporal = CrossTemporalBlock(width, heads, context, key=keys[3], dtype=dtype)
        self.transformer_blocks = nnx.Dict({"0": spatial})
        self.temporal_transformer_blocks = nnx.Dict({"0": temporal})
        self.time_pos_embed = TimestepEmbedding(width, 4 * width, key=keys[4], dtype=dtype, role="embedder", out=width)
        self.time_mixer = Blend(dtype=dtype)

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same."""
        inner = self.proj_in(per_frame(self.norm, x).astype(x.dtype))
        tokens = rearrange(inner, "b f h w c -> b f (h w) c")
        spatial = self.transformer_blocks["0"](tokens, conditioning.context)
        numbers = jnp.arange(x.shape[1], dtype=jnp.promote_types(x.dtype, jnp.float32))
        placed = spatial + self.time_pos_embed(numbers, x.dtype).astype(x.dtype)[:, None, :]  # f c -> f 1 c
        temporal = self.temporal_transformer_blocks["0"](placed, conditioning.context)
        blended = self.time_mixer(spatial, temporal)
        return x + self.proj_out(blended.reshape(x.shape))  # b f (h w) c -> b f h w c
