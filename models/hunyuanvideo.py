"""HunyuanVideo, text-to-video (diffusers' HunyuanVideoTransformer3DModel).

Read in diffusers 0.42 `models/transformers/transformer_hunyuan_video.py`, `models/normalization.py` (AdaLayerNormZero,
AdaLayerNormZeroSingle, AdaLayerNormContinuous) and `pipelines/hunyuan_video/pipeline_hunyuan_video.py`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from models.blocks import FeedForward, merge_heads, modulate, query_key_value, split_heads
from models.hunyuanvideo_config import HunyuanVideoConfig, check_inputs
from models.hunyuanvideo_text import EPSILON, ConditionEmbedding, TokenRefiner
from qvdjax.nn import (
    Attention,
    Conv,
    LayerNorm,
    Linear,
    RMSNorm,
    Stack,
    VideoModel,
    at_least_float32,
    stacked,
)  # fmt: skip
from qvdjax.nn.embeddings import axial_rope, rotate_adjacent_pairs
from qvdjax.parallel.rules import constrain


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["embedding", "key_lengths", "cosines", "sines"],
    meta_fields=["grid"],
)
@dataclasses.dataclass(frozen=True)
class HunyuanVideoConditioning:
    """What the blocks and the head read.

    Attributes:
        embedding: (batch, width), of timestep, guidance and pooled text; each norm applies its own SiLU to it.
        key_lengths: (batch,), video tokens and those of the text: padding comes after them.
        cosines, sines: (video + text tokens, head_dim / 2) rotary tables, at least float32.
        grid: Patches along frames, height and width.
    """

    embedding: jax.Array
    key_lengths: jax.Array
    cosines: jax.Array
    sines: jax.Array
    grid: tuple[int, int, int]

    @property
    def video_tokens(self) -> int:
        """How many tokens at the start of the stream are video."""
        frames, rows, columns = self.grid
        return frames * rows * columns


class AdaptiveNorm(nnx.Module):
    """A layer that makes shifts, scales and gates, and the LayerNorm without weights before they apply."""

    def __init__(self, width: int, vectors: int, *, key: jax.Array, dtype):
        modulation = {"role": "modulation", "axes": ("mlp", "embed"), "dtype": dtype}
        self.linear = Linear(width, vectors * width, key=key, **modulation)
        self.norm = LayerNorm(width, epsilon=EPSILON, affine=False)
        self.vectors = vectors

    def __call__(self, embedding: jax.Array) -> jax.Array:
        """(batch, width) -> (vectors, batch, 1, width), at least float32."""
        vectors = at_least_float32(self.linear(jax.nn.silu(embedding)))
        return rearrange(vectors, "b (n d) -> n b 1 d", n=self.vectors)


def _attend(attention: Attention, query, key, value, conditioning: HunyuanVideoConditioning) -> jax.Array:
    """Queries and keys turned by their positions, then attention; (batch, tokens, heads, head_dim) -> merged heads."""
    tables = conditioning.cosines, conditioning.sines
    query, key = rotate_adjacent_pairs(query, *tables), rotate_adjacent_pairs(key, *tables)
    return merge_heads(attention(query, key, value, conditioning.key_lengths))


class JointAttention(nnx.Module):
    """Attention of all tokens to all, video and text each with their own projections and norms within a head."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 8)
        width = config.width
        self.to_q, self.to_k, self.to_v = query_key_value(width, keys[:3], dtype=dtype)
        self.add_q_proj, self.add_k_proj, self.add_v_proj = query_key_value(width, keys[3:6], dtype=dtype)
        back = {"role": "attention_output", "axes": ("embed", "heads"), "dtype": dtype}
        self.to_out = nnx.Dict({"0": Linear(width, width, key=keys[6], **back)})
        self.to_add_out = Linear(width, width, key=keys[7], **back)
        norm = functools.partial(RMSNorm, config.attention_head_dim, epsilon=EPSILON, axis=None, dtype=dtype)
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = norm(), norm(), norm(), norm()
        self.attention = Attention()
        self.heads = config.num_attention_heads

    def __call__(self, video: jax.Array, text: jax.Array, conditioning) -> tuple[jax.Array, jax.Array]:
        """(batch, video tokens, width), (batch, text tokens, width) -> the same two."""
        of_video = (
            self.norm_q(split_heads(self.to_q(video), self.heads)),
            self.norm_k(split_heads(self.to_k(video), self.heads)),
        )
        of_text = (
            self.norm_added_q(split_heads(self.add_q_proj(text), self.heads)),
            self.norm_added_k(split_heads(self.add_k_proj(text), self.heads)),
        )
        # [video tokens], [text tokens] -> [tokens]
        query, key = (jnp.concatenate(pair, axis=1) for pair in zip(of_video, of_text, strict=True))
        values = split_heads(self.to_v(video), self.heads), split_heads(self.add_v_proj(text), self.heads)
        out = _attend(self.attention, query, key, jnp.concatenate(values, axis=1), conditioning)
        return self.to_out["0"](out[:, : video.shape[1]]), self.to_add_out(out[:, video.shape[1] :])


class DualBlock(nnx.Module):
    """Joint attention, then feed-forward; video and text have weights of their own and meet in attention alone."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 5)
        width = config.width
        self.norm1 = AdaptiveNorm(width, 6, key=keys[0], dtype=dtype)
        self.norm1_context = AdaptiveNorm(width, 6, key=keys[1], dtype=dtype)
        self.attn = JointAttention(config, key=keys[2], dtype=dtype)
        self.norm2 = LayerNorm(width, epsilon=EPSILON, affine=False)
        self.norm2_context = LayerNorm(width, epsilon=EPSILON, affine=False)
        self.ff = FeedForward(width, config.ffn_dim, key=keys[3], dtype=dtype)
        self.ff_context = FeedForward(width, config.ffn_dim, key=keys[4], dtype=dtype)

    def __call__(self, x: jax.Array, conditioning: HunyuanVideoConditioning) -> jax.Array:
        """x (batch, video + text tokens, width) -> the same. Norms, modulation and gates are float32 islands."""
        x, dtype = constrain(x, "batch", "tokens", None), x.dtype
        video, text = x[:, : conditioning.video_tokens], x[:, conditioning.video_tokens :]
        shift, scale, gate, ff_shift, ff_scale, ff_gate = self.norm1(conditioning.embedding)
        of_text = self.norm1_context(conditioning.embedding)
        text_shift, text_scale, text_gate, text_ff_shift, text_ff_scale, text_ff_gate = of_text

        change, text_change = self.attn(
            modulate(self.norm1.norm(video), scale, shift, dtype),
            modulate(self.norm1_context.norm(text), text_scale, text_shift, dtype),
            conditioning,
        )
        video, text = _gated(video, change, gate), _gated(text, text_change, text_gate)

        change = self.ff(modulate(self.norm2(video), ff_scale, ff_shift, dtype))
        text_change = self.ff_context(modulate(self.norm2_context(text), text_ff_scale, text_ff_shift, dtype))
        video, text = _gated(video, change, ff_gate), _gated(text, text_change, text_ff_gate)
        return constrain(jnp.concatenate([video, text], axis=1), "batch", "tokens", None)


def _gated(x: jax.Array, change: jax.Array, gate: jax.Array) -> jax.Array:
    return (at_least_float32(x) + change * gate).astype(x.dtype)


class SingleAttention(nnx.Module):
    """Attention of all tokens to all without a projection at its end, which `SingleBlock` has."""

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        self.to_q, self.to_k, self.to_v = query_key_value(config.width, keys, dtype=dtype)
        norm = functools.partial(RMSNorm, config.attention_head_dim, epsilon=EPSILON, axis=None, dtype=dtype)
        self.norm_q, self.norm_k = norm(), norm()
        self.attention = Attention()
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, conditioning: HunyuanVideoConditioning) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        query, key = (
            self.norm_q(split_heads(self.to_q(x), self.heads)),
            self.norm_k(split_heads(self.to_k(x), self.heads)),
        )
        return _attend(self.attention, query, key, split_heads(self.to_v(x), self.heads), conditioning)


class SingleBlock(nnx.Module):
    """Attention and feed-forward side by side, with the same weights for video and text.

    `proj_out` is the output projection of both: it has the role feed_forward_out, four fifths of its input.
    """

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        width, hidden = config.width, config.ffn_dim
        self.norm = AdaptiveNorm(width, 3, key=keys[0], dtype=dtype)
        self.attn = SingleAttention(config, key=keys[1], dtype=dtype)
        self.proj_mlp = Linear(width, hidden, role="feed_forward_in", axes=("mlp", "embed"), key=keys[2], dtype=dtype)
        self.proj_out = Linear(
            width + hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=keys[3], dtype=dtype
        )

    def __call__(self, x: jax.Array, conditioning: HunyuanVideoConditioning) -> jax.Array:
        """x (batch, video + text tokens, width) -> the same. Norms, modulation and gates are float32 islands."""
        x = constrain(x, "batch", "tokens", None)
        shift, scale, gate = self.norm(conditioning.embedding)
        normalised = modulate(self.norm.norm(x), scale, shift, x.dtype)
        hidden = jax.nn.gelu(self.proj_mlp(normalised), approximate=True)
        both = jnp.concatenate([self.attn(normalised, conditioning), hidden], axis=-1)  # b t d, b t h -> b t (d h)
        return constrain(_gated(x, self.proj_out(both), gate), "batch", "tokens", None)


class HunyuanVideoModel(VideoModel):
    """The HunyuanVideo transformer. One stream of video tokens (frame-major, then row, then column), then text tokens.

    Padding comes after the text's tokens and influences nothing, except ranges that span all tokens of a sample.
    """

    timestep_roles = ("time",)  # modulation sees the pooled text and the guidance too

    def __init__(self, config: HunyuanVideoConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 7)
        self.config, width = config, config.width
        conv = Conv(
            config.in_channels, width, config.patch, stride=config.patch, role="embedder", axes=("embed", None),
            key=keys[0], dtype=dtype,
        )  # fmt: skip
        self.x_embedder = nnx.Dict({"proj": conv})
        self.context_embedder = TokenRefiner(config, key=keys[1], dtype=dtype)
        self.time_text_embed = ConditionEmbedding(
            config.pooled_projection_dim, width, guidance=config.guidance_embeds, key=keys[2], dtype=dtype
        )
        dual = stacked(lambda k: DualBlock(config, key=k, dtype=dtype), config.num_layers, keys[3])
        single = stacked(lambda k: SingleBlock(config, key=k, dtype=dtype), config.num_single_layers, keys[4])
        self.stacks = nnx.List([
            Stack(dual, prefix="transformer_blocks", count=config.num_layers),
            Stack(single, prefix="single_transformer_blocks", count=config.num_single_layers),
        ])  # fmt: skip
        self.norm_out = AdaptiveNorm(width, 2, key=keys[5], dtype=dtype)
        outputs = config.out_channels * config.patch_size_t * config.patch_size**2
        self.proj_out = Linear(width, outputs, role="head", axes=(None, "embed"), key=keys[6], dtype=dtype)

    def embed(self, latents, timestep, context, *, pooled_projections=None, encoder_attention_mask=None, guidance=None):
        """Latents (batch, frames, height, width, channels) -> tokens (batch, tokens, width) and conditioning.

        Computation is in the type of the weights.

        Args:
            latents, timestep, context: See `VideoModel`; context is of the language model, padded to one length.
            pooled_projections: (batch, pooled_projection_dim), CLIP's pooled embedding of the text.
            encoder_attention_mask: (batch, text tokens), true (or 1) for a text's tokens, which come first, false for
                the padding after them. None: there is no padding. Only how many are true is read.
            guidance: (batch,), 1000 times the guidance scale, of a model that has `guidance_embeds`.

        Raises:
            UserError: Sizes that the patch does not divide, other channels or text widths than the checkpoint's, a
                condition that is missing or that the model does not take.
        """
        config = self.config
        conditions = {"pooled_projections": pooled_projections, "guidance": guidance}
        shapes = {name: None if array is None else array.shape for name, array in conditions.items()}
        mask = encoder_attention_mask
        check_inputs(config, latents.shape, timestep.shape, context.shape, None if mask is None else mask.shape, shapes)
        grid = tuple(size // patch for size, patch in zip(latents.shape[1:4], config.patch, strict=True))
        dtype = self.proj_out.bias[...].dtype  # a bias stays float when its layer is quantized
        if mask is None:
            lengths = jnp.full(context.shape[:1], context.shape[1], jnp.int32)
        else:
            lengths = (mask != 0).sum(axis=1, dtype=jnp.int32)  # (batch, text tokens) -> (batch,)

        embedding = self.time_text_embed(timestep, pooled_projections, guidance, dtype)
        text = constrain(self.context_embedder(context, lengths, timestep, dtype), "batch", None, None)
        video = rearrange(self.x_embedder["proj"](latents.astype(dtype)), "b f h w d -> b (f h w) d")
        wide = jnp.promote_types(dtype, jnp.float32)
        cosines, sines = (jnp.asarray(table, wide) for table in rotary_tables(config, grid, context.shape[1]))
        conditioning = HunyuanVideoConditioning(embedding, video.shape[1] + lengths, cosines, sines, grid)
        return jnp.concatenate([video, text], axis=1), conditioning

    def video_tokens(self, tokens: int, conditioning) -> slice:
        """Those before the text's."""
        return slice(0, conditioning.video_tokens)

    def token_frames(self, conditioning) -> int:
        """Those of the patches."""
        return conditioning.grid[0]

    def head(self, stream, conditioning):
        """Tokens -> latents (batch, frames, height, width, out_channels); in a patch, columns vary fastest."""
        video = stream[:, : conditioning.video_tokens]
        scale, shift = self.norm_out(conditioning.embedding)  # in this order, unlike in blocks
        out = self.proj_out(modulate(self.norm_out.norm(video), scale, shift, stream.dtype))
        (f, h, w), (r, p, q) = conditioning.grid, self.config.patch
        pattern = "b (f h w) (c r p q) -> b (f r) (h p) (w q) c"
        return rearrange(out, pattern, f=f, h=h, w=w, r=r, p=p, q=q)


def rotary_tables(config: HunyuanVideoConfig, grid: tuple[int, int, int], text: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines (video + text tokens, head_dim / 2) in float64; text tokens are not turned."""
    cosines, sines = axial_rope(grid, config.rope_axes_dim, theta=config.rope_theta)
    still = (text, cosines.shape[-1])
    return np.concatenate([cosines, np.ones(still)]), np.concatenate([sines, np.zeros(still)])
