"""How HunyuanVideo reads what a video is conditioned on: timestep, guidance, pooled text, and the text's tokens.

Read in diffusers 0.42 `models/transformers/transformer_hunyuan_video.py` and `models/embeddings.py`
(CombinedTimestepTextProjEmbeddings, PixArtAlphaTextProjection).
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.blocks import FeedForward, TimestepEmbedding, merge_heads, query_key_value, split_heads
from models.hunyuanvideo_config import FREQUENCIES, HunyuanVideoConfig
from qvdjax.nn import Attention, LayerNorm, Linear, at_least_float32

EPSILON = 1e-6  # of every norm


class TextProjection(nnx.Module):
    """One vector a text: Linear, SiLU, Linear."""

    def __init__(self, features: int, width: int, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        common = {"role": "embedder", "axes": ("embed", None), "dtype": dtype}
        self.linear_1 = Linear(features, width, key=keys[0], **common)
        self.linear_2 = Linear(width, width, key=keys[1], **common)

    def __call__(self, pooled: jax.Array) -> jax.Array:
        """(batch, features) -> (batch, width)."""
        return self.linear_2(jax.nn.silu(self.linear_1(pooled)))


class ConditionEmbedding(nnx.Module):
    """Timestep, one vector a text and, where a model has it, guidance -> their sum, one vector a video.

    Of its layers the timestep's alone have the role time: they see nothing else.
    """

    def __init__(self, text: int, width: int, *, guidance: bool, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        number = functools.partial(TimestepEmbedding, FREQUENCIES, width, dtype=dtype)
        self.timestep_embedder = number(key=keys[0])
        self.text_embedder = TextProjection(text, width, key=keys[1], dtype=dtype)
        self.guidance_embedder = number(key=keys[2], role="embedder") if guidance else None

    def __call__(self, timestep: jax.Array, pooled: jax.Array, guidance: jax.Array | None, dtype) -> jax.Array:
        """timestep and guidance (batch,), pooled (batch, features) -> (batch, width) in `dtype`."""
        embedding = self.timestep_embedder(timestep, dtype) + self.text_embedder(pooled.astype(dtype))
        if self.guidance_embedder is not None:
            embedding = embedding + self.guidance_embedder(guidance, dtype)
        return embedding.astype(dtype)


class RefinerAttention(nnx.Module):
    """Attention of text tokens to those that count, without positions or norms."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        width = config.width
        self.to_q, self.to_k, self.to_v = query_key_value(width, keys[:3], dtype=dtype)
        back = {"axes": ("embed", "heads"), "dtype": dtype}
        self.to_out = nnx.Dict({"0": Linear(width, width, role="attention_output", key=keys[3], **back)})
        self.attention = Attention()
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x (batch, text tokens, width), lengths (batch,) -> like x."""
        query, key, value = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        return self.to_out["0"](merge_heads(self.attention(query, key, value, lengths)))


class RefinerBlock(nnx.Module):
    """Attention, then feed-forward, each after a norm and before a gate."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        width = config.width
        norm = functools.partial(LayerNorm, width, epsilon=EPSILON, affine=True, dtype=dtype)
        self.norm1, self.norm2 = norm(), norm()
        self.attn = RefinerAttention(config, key=keys[0], dtype=dtype)
        # Four times as wide whatever `mlp_ratio` says, which is of the other blocks.
        self.ff = FeedForward(width, 4 * width, key=keys[1], dtype=dtype, activation="linear-silu")
        modulation = {"role": "modulation", "axes": ("mlp", "embed"), "dtype": dtype}
        self.norm_out = nnx.Dict({"linear": Linear(width, 2 * width, key=keys[2], **modulation)})

    def __call__(self, x: jax.Array, embedding: jax.Array, lengths: jax.Array) -> jax.Array:
        """x (batch, text tokens, width), embedding (batch, width), lengths (batch,) -> like x."""
        vectors = at_least_float32(self.norm_out["linear"](jax.nn.silu(embedding)))
        gate, ff_gate = rearrange(vectors, "b (two d) -> two b 1 d", two=2)
        x = (at_least_float32(x) + self.attn(self.norm1(x).astype(x.dtype), lengths) * gate).astype(x.dtype)
        return (at_least_float32(x) + self.ff(self.norm2(x).astype(x.dtype)) * ff_gate).astype(x.dtype)


class TokenRefiner(nnx.Module):
    """Text embeddings of a language model -> text tokens, after some blocks that see the whole text."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        first, second, *keys = jax.random.split(key, 2 + config.num_refiner_layers)
        self.time_text_embed = ConditionEmbedding(
            config.text_embed_dim, config.width, guidance=False, key=first, dtype=dtype
        )
        self.proj_in = Linear(
            config.text_embed_dim, config.width, role="embedder", axes=("embed", None), key=second, dtype=dtype
        )
        blocks = {str(number): RefinerBlock(config, key=k, dtype=dtype) for number, k in enumerate(keys)}
        self.token_refiner = nnx.Dict({"refiner_blocks": nnx.Dict(blocks)})
        self.layers = config.num_refiner_layers

    def __call__(self, context: jax.Array, lengths: jax.Array, timestep: jax.Array, dtype) -> jax.Array:
        """context (batch, text tokens, text_embed_dim), lengths and timestep (batch,) -> (batch, text tokens, width).

        Tokens from `lengths` on are padding; what becomes of them says nothing, and nothing else sees them.
        """
        counts = jnp.arange(context.shape[1]) < lengths[:, None]  # (batch, text tokens)
        wide = jnp.where(counts[..., None], at_least_float32(context), 0)
        at_least_one = jnp.maximum(lengths, 1)
        mean = wide.sum(axis=1) / at_least_one.astype(wide.dtype)[:, None]  # (batch, text_embed_dim)
        embedding = self.time_text_embed(timestep, mean, None, dtype)
        x = self.proj_in(context.astype(dtype))
        for number in range(self.layers):
            x = self.token_refiner["refiner_blocks"][str(number)](x, embedding, at_least_one)
        return x
