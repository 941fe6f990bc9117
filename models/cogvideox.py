"""CogVideoX 1.0 and 1.5, text-to-video and image-to-video (diffusers' CogVideoXTransformer3DModel).

Read in diffusers 0.42 `models/transformers/cogvideox_transformer_3d.py`, `models/embeddings.py`
(CogVideoXPatchEmbed), `models/normalization.py` and `models/attention_processor.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.blocks import FeedForward, TimestepEmbedding, merge_heads, modulate, query_key_value, split_heads
from models.cogvideox_config import CogVideoXConfig, check_sizes
from models.cogvideox_positions import rotary_tables, sine_table
from models.inputs import join_image
from qvdjax.errors import UserError
from qvdjax.nn import (
    Attention,
    CarriesValues,
    Conv,
    LayerNorm,
    Linear,
    Param,
    Stack,
    VideoModel,
    at_least_float32,
    stacked,
    tables_of,
)  # fmt: skip
from qvdjax.nn.embeddings import rotate_adjacent_pairs
from qvdjax.parallel.rules import constrain

OFS = 2.0  # what diffusers' image-to-video pipeline always passes


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["time_embedding", "cosines", "sines"],
    meta_fields=["grid", "text_tokens"],
)
@dataclasses.dataclass(frozen=True)
class CogVideoXConditioning:
    """What the blocks and the head read.

    Attributes:
        time_embedding: (batch, time_embed_dim); each norm applies its own SiLU to it.
        cosines, sines: (text + video tokens, head_dim / 2) rotary tables, or None.
        grid: Patches along frames, height and width.
        text_tokens: How many tokens at the start of the stream are text.
    """

    time_embedding: jax.Array
    cosines: jax.Array | None
    sines: jax.Array | None
    grid: tuple[int, int, int]
    text_tokens: int

    def of_token(self, pair: jax.Array, tokens: int) -> jax.Array:
        """(2, batch, 1, width), for video and for text, to (batch, tokens, width)."""
        is_text = jnp.arange(tokens)[:, None] < self.text_tokens  # (tokens, 1)
        return jnp.where(is_text, pair[1], pair[0])


class CogVideoXAttention(CarriesValues):
    """Attention of all tokens, text and video, to all; queries and keys are normalised within each head."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        width = config.width
        projections = query_key_value(width, keys[:3], dtype=dtype, bias=config.attention_bias)
        self.to_q, self.to_k, self.to_v = projections
        back = {"axes": ("embed", "heads"), "dtype": dtype}
        self.to_out = nnx.Dict({"0": Linear(width, width, role="attention_output", key=keys[3], **back)})
        norm = functools.partial(LayerNorm, config.attention_head_dim, epsilon=1e-6, affine=True, axis=None)
        self.norm_q, self.norm_k = norm(dtype=dtype), norm(dtype=dtype)
        self.attention = Attention()
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, conditioning: CogVideoXConditioning) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        query, key, value = (split_heads(project(x), self.heads) for project in (self.to_q, self.to_k, self.to_v))
        query, key = self.norm_q(query).astype(x.dtype), self.norm_k(key).astype(x.dtype)
        if conditioning.cosines is not None:
            tables = conditioning.cosines, conditioning.sines
            query, key = rotate_adjacent_pairs(query, *tables), rotate_adjacent_pairs(key, *tables)
        return self.to_out["0"](merge_heads(self.attention(query, key, value)))


class AdaptiveNorm(nnx.Module):
    """One LayerNorm for text and video, modulated for each on its own (diffusers' CogVideoXLayerNormZero)."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype):
        modulation = {"role": "modulation", "axes": ("mlp", "embed"), "dtype": dtype}
        self.linear = Linear(config.time_embed_dim, 6 * config.width, key=key, **modulation)
        self.norm = _norm(config, dtype)

    def __call__(self, x: jax.Array, conditioning: CogVideoXConditioning) -> tuple[jax.Array, jax.Array]:
        """x (batch, tokens, width) -> the same, modulated, and its gates, (2, batch, 1, width) at least float32."""
        vectors = at_least_float32(self.linear(jax.nn.silu(conditioning.time_embedding)))
        # shift, scale and gate of video, then those of text
        shift, scale, gate = rearrange(vectors, "b (two three d) -> three two b 1 d", two=2, three=3)
        of_token = functools.partial(conditioning.of_token, tokens=x.shape[1])
        return modulate(self.norm(x), of_token(scale), of_token(shift), x.dtype), gate


class CogVideoXBlock(nnx.Module):
    """Joint attention, then feed-forward, each between an adaptive norm and a gate."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        self.norm1 = AdaptiveNorm(config, key=keys[0], dtype=dtype)
        self.attn1 = CogVideoXAttention(config, key=keys[1], dtype=dtype)
        self.norm2 = AdaptiveNorm(config, key=keys[2], dtype=dtype)
        self.ff = FeedForward(config.width, config.ffn_dim, key=keys[3], dtype=dtype)

    def __call__(self, x: jax.Array, conditioning: CogVideoXConditioning) -> jax.Array:
        """x (batch, text + video tokens, width) -> the same. Norms, modulation and gates are float32 islands."""
        x = constrain(x, "batch", "tokens", None)
        normalised, gate = self.norm1(x, conditioning)
        x = self._gated(x, self.attn1(normalised, conditioning), gate, conditioning)
        normalised, gate = self.norm2(x, conditioning)
        return constrain(self._gated(x, self.ff(normalised), gate, conditioning), "batch", "tokens", None)

    def _gated(self, x, change, gate, conditioning):
        return (at_least_float32(x) + change * conditioning.of_token(gate, x.shape[1])).astype(x.dtype)


class PatchEmbed(nnx.Module):
    """Latents and text embeddings -> tokens, text first."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        common = {"role": "embedder", "axes": ("embed", None), "dtype": dtype}
        if config.patch_size_t is None:
            patch = config.patch[1:]
            self.proj = Conv(
                config.in_channels, config.width, patch, stride=patch, bias=config.patch_bias, key=keys[0], **common
            )
        else:  # has a bias whatever `patch_bias` says: upstream ignores it here, and the checkpoints hold one
            features = config.in_channels * config.patch[0] * config.patch_size**2
            self.proj = Linear(features, config.width, key=keys[0], **common)
        self.text_proj = Linear(config.text_embed_dim, config.width, key=keys[1], **common)
        self.pos_embedding = _position_table(config, dtype) if config.use_learned_positional_embeddings else None
        self.config = config

    def __call__(self, latents: jax.Array, context: jax.Array) -> jax.Array:
        """(batch, frames, height, width, channels), (batch, text tokens, text_embed_dim) -> (batch, tokens, width)."""
        config, (r, p, q) = self.config, self.config.patch
        if config.patch_size_t is None:
            frames = self.proj(rearrange(latents, "b f h w c -> (b f) h w c"))
            video = rearrange(frames, "(b f) h w d -> b (f h w) d", b=len(latents))
        else:
            video = self.proj(rearrange(latents, "b (f r) (h p) (w q) c -> b (f h w) (c r p q)", r=r, p=p, q=q))
        text = self.text_proj(context)
        if self.pos_embedding is not None:
            table = self.pos_embedding[...].astype(video.dtype)  # (1, max_text_seq_length + video tokens, width)
            text = text + table[:, : text.shape[1]]
            video = video + table[:, config.max_text_seq_length :]
        elif config.adds_positions:
            video = video + sine_table(config, config.grid(latents.shape[1:4]), video.dtype)
        return jnp.concatenate([text, video], axis=1)


def _position_table(config: CogVideoXConfig, dtype) -> Param:
    """The learned table (1, max_text_seq_length + video tokens, width), as diffusers starts it."""
    text = jnp.zeros((config.max_text_seq_length, config.width), dtype)
    table = sine_table(config, config.grid(config.sample_size), dtype)
    return Param(jnp.concatenate([text, table])[None], axes=(None, None, "embed"))


class AdaptiveHeadNorm(nnx.Module):
    """The last norm, modulated by the time embedding (diffusers' AdaLayerNorm)."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype):
        modulation = {"role": "modulation", "axes": ("mlp", "embed"), "dtype": dtype}
        self.linear = Linear(config.time_embed_dim, 2 * config.width, key=key, **modulation)
        self.norm = _norm(config, dtype)

    def __call__(self, x: jax.Array, time_embedding: jax.Array, dtype) -> jax.Array:
        """x (batch, tokens, width), (batch, time_embed_dim) -> like x, in `dtype`."""
        vectors = at_least_float32(self.linear(jax.nn.silu(time_embedding)))
        shift, scale = rearrange(vectors, "b (two d) -> two b 1 d", two=2)
        return modulate(self.norm(x), scale, shift, dtype)


def _norm(config: CogVideoXConfig, dtype) -> LayerNorm:
    return LayerNorm(config.width, epsilon=config.norm_eps, affine=config.norm_elementwise_affine, dtype=dtype)


class CogVideoXModel(VideoModel):
    """The CogVideoX transformer. One stream of text tokens, then video tokens: frame-major, then row, then column."""

    def __init__(self, config: CogVideoXConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 6)
        self.config = config
        self.patch_embed = PatchEmbed(config, key=keys[0], dtype=dtype)
        embedding = functools.partial(TimestepEmbedding, width=config.time_embed_dim, dtype=dtype)
        self.time_embedding = embedding(config.width, key=keys[1])
        self.ofs_embedding = embedding(config.ofs_embed_dim, key=keys[2]) if config.ofs_embed_dim else None
        blocks = stacked(lambda k: CogVideoXBlock(config, key=k, dtype=dtype), config.num_layers, keys[3])
        self.stacks = nnx.List([Stack(blocks, prefix="transformer_blocks", count=config.num_layers)])
        self.norm_final = _norm(config, dtype)
        self.norm_out = AdaptiveHeadNorm(config, key=keys[4], dtype=dtype)
        outputs = config.out_channels * config.patch[0] * config.patch_size**2
        self.proj_out = Linear(config.width, outputs, role="head", axes=(None, "embed"), key=keys[5], dtype=dtype)

    def embed(self, latents, timestep, context, *, image_latents=None, ofs=None):
        """Latents (batch, frames, height, width, channels) -> tokens (batch, tokens, width) and conditioning.

        Computation is in the type of the weights.

        Args:
            latents, timestep, context: See `VideoModel`.
            image_latents: Of an image-to-video model, (batch, frames, height, width, in_channels - out_channels): the
                image's latents in the first frame, zeros after it. They may also be the last channels of `latents`.
            ofs: (batch,) or (1,), of a model that has `ofs_embed_dim` (CogVideoX 1.5 image-to-video); by default 2,
                which diffusers' pipeline always passes.

        Raises:
            UserError: Sizes that the patch does not divide or the position tables do not hold, other channels or
                another text width than the checkpoint's, a condition that the model does not take.
        """
        config = self.config
        if image_latents is not None:
            latents = join_image(latents, image_latents)
        check_sizes(config, latents.shape, context.shape)
        if ofs is not None and self.ofs_embedding is None:
            raise UserError("this model takes no ofs", remedy="leave it out: only CogVideoX 1.5 image-to-video does")
        if ofs is not None and tables_of(self.ofs_embedding):
            raise UserError(f"this model's tables were made for an ofs of {OFS}", remedy="leave ofs out")
        dtype = self.proj_out.bias[...].dtype  # a bias stays float when its layer is quantized
        embedding = self.time_embedding(timestep, dtype)
        if self.ofs_embedding is not None:
            embedding = embedding + self.ofs_embedding(jnp.atleast_1d(jnp.asarray(OFS if ofs is None else ofs)), dtype)
        x = self.patch_embed(latents.astype(dtype), context.astype(dtype))
        grid = config.grid(latents.shape[1:4])
        cosines = sines = None
        if config.use_rotary_positional_embeddings:
            tables = rotary_tables(config, grid, context.shape[1])
            cosines, sines = (jnp.asarray(table, jnp.promote_types(dtype, jnp.float32)) for table in tables)
        return x, CogVideoXConditioning(embedding.astype(dtype), cosines, sines, grid, context.shape[1])

    def video_tokens(self, tokens: int, conditioning) -> slice:
        """Those after the text's."""
        return slice(conditioning.text_tokens, tokens)

    def token_frames(self, conditioning) -> int:
        """Those of the patches."""
        return conditioning.grid[0]

    def head(self, stream, conditioning):
        """Tokens -> latents (batch, frames, height, width, out_channels); in a patch, columns vary fastest."""
        video = self.norm_final(stream[:, conditioning.text_tokens :])
        out = self.proj_out(self.norm_out(video, conditioning.time_embedding, stream.dtype))
        (f, h, w), (r, p, q) = conditioning.grid, self.config.patch
        pattern = "b (f h w) (c r p q) -> b (f r) (h p) (w q) c"
        return rearrange(out, pattern, f=f, h=h, w=w, r=r, p=p, q=q)
