"""Wan 2.1 text-to-video and image-to-video (diffusers' WanTransformer3DModel), and Wan 2.2's per-token timesteps.

Read in diffusers 0.42 `models/transformers/transformer_wan.py` and Wan-Video/Wan2.1 `wan/modules/model.py`.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.blocks import FeedForward, merge_heads, modulate, query_key_value, split_heads
from models.inputs import check_channels, check_context, check_patches, join_image
from qvdjax.errors import UserError
from qvdjax.nn import (
    Attention,
    CarriesValues,
    Conv,
    LayerNorm,
    Linear,
    Param,
    RMSNorm,
    Stack,
    VideoModel,
    at_least_float32,
    stacked,
)  # fmt: skip
from qvdjax.nn.embeddings import axial_rope, rotate_adjacent_pairs, timestep_sinusoid
from qvdjax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """Fields of `config.json`; the defaults are diffusers'."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "patch_size", tuple(self.patch_size))
        object.__setattr__(self, "out_channels", self.out_channels or self.in_channels)
        if self.pos_embed_seq_len is not None:
            raise UserError(
                "this Wan checkpoint follows a first and a last frame (pos_embed_seq_len), which is not supported yet",
                remedy="use one that follows a first frame, or text alone",
            )
        if (self.image_dim is None) != (self.added_kv_proj_dim is None):
            raise UserError(
                f"image_dim {self.image_dim} and added_kv_proj_dim {self.added_kv_proj_dim}: one without the other",
                remedy="restore config.json; both belong to an image-to-video checkpoint",
            )
        if self.added_kv_proj_dim not in (None, self.width):
            raise UserError(
                f"added_kv_proj_dim {self.added_kv_proj_dim} beside tokens of {self.width} features",
                remedy="restore config.json; images are embedded with as many features as tokens",
            )
        if self.in_channels < self.out_channels or (self.image_dim and not self.image_channels):
            raise UserError(
                f"{self.in_channels} channels become {self.out_channels}",
                remedy="restore config.json; an image's channels come in addition to those that are sampled",
            )
        if self.qk_norm != "rms_norm_across_heads":
            raise UserError(f"unknown qk_norm {self.qk_norm!r}", remedy="Wan models have 'rms_norm_across_heads'")
        if self.attention_head_dim % 2:
            raise UserError(
                f"attention_head_dim {self.attention_head_dim} is odd",
                remedy="rotary positions turn pairs of a head's features, so make it even",
            )

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.patch_size

    @property
    def least_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the smallest latents that the model takes."""
        return self.patch_size

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are sampled."""
        return self.out_channels

    @property
    def image_channels(self) -> int:
        """Channels that an image adds to the latents: which frames are its, and its own latents; 0 without one."""
        return self.in_channels - self.out_channels

    @property
    def text_tokens(self) -> int:
        """Length that Wan's own code pads texts to (Wan-Video/Wan2.1:wan/configs/shared_config.py, text_len)."""
        return 512

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's part of the inputs beside latents, timestep and context, by diffusers' names; of an
        image's latents for the smallest latents, of its tokens those of CLIP ViT-H/14."""
        added = {} if self.image_dim is None else {"encoder_hidden_states_image": (257, self.image_dim)}
        if self.image_channels:
            added["image_latents"] = (*self.least_size, self.image_channels)
        return added

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Features of a head that turn with frame, row and column."""
        side = 2 * (self.attention_head_dim // 6)
        return self.attention_head_dim - 2 * side, side, side

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(self), "patch_size": [*self.patch_size]}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["time_embedding", "modulation", "context", "image", "cosines", "sines"],
    meta_fields=["grid"],
)
@dataclasses.dataclass(frozen=True)
class WanConditioning:
    """What the blocks and the head read.

    Attributes:
        time_embedding: (batch, tokens or 1, width), for the head.
        modulation: (batch, tokens or 1, 6, width), float32.
        context: (batch, text tokens, width).
        image: (batch, image tokens, width), or None.
        cosines, sines: (tokens, head_dim / 2) rotary tables.
        grid: Patches along frames, height and width.
    """

    time_embedding: jax.Array
    modulation: jax.Array
    context: jax.Array
    image: jax.Array | None
    cosines: jax.Array
    sines: jax.Array
    grid: tuple[int, int, int]


class WanAttention(CarriesValues):
    """Self-attention over video tokens, or cross-attention to the text and, with keys and values of its own and the
    same queries, to an image; what both give is added."""

    def __init__(
        self, config: WanConfig, *, to: Literal["stream", "context"], key: jax.Array, dtype, image: bool = False
    ):  # fmt: skip
        keys = jax.random.split(key, 6)
        width = config.width
        self.to_q, self.to_k, self.to_v = query_key_value(width, keys[:3], dtype=dtype)
        back = {"axes": ("embed", "heads"), "dtype": dtype}
        self.to_out = nnx.Dict({"0": Linear(width, width, role="attention_output", key=keys[3], **back)})
        self.norm_q = RMSNorm(width, epsilon=config.eps, dtype=dtype)
        self.norm_k = RMSNorm(width, epsilon=config.eps, dtype=dtype)
        self.attention = Attention(keys=to)
        self.heads = config.num_attention_heads
        self.image_attention = Attention(keys=to) if image else None
        if image:
            across = {"axes": ("heads", "embed"), "dtype": dtype}
            self.add_k_proj = Linear(width, width, role="key", key=keys[4], **across)
            self.add_v_proj = Linear(width, width, role="value", key=keys[5], **across)
            self.norm_added_k = RMSNorm(width, epsilon=config.eps, dtype=dtype)
            self.value_layers = (("to_v",), ("add_v_proj",))

    def __call__(
        self, x: jax.Array, context: jax.Array, rope: tuple | None = None, image: jax.Array | None = None
    ) -> jax.Array:  # fmt: skip
        """x (batch, tokens, width) attends to context (batch, keys, width); `rope` turns both by (cosines, sines), and
        `image` is (batch, image tokens, width)."""
        query, key, value = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(context)), self.to_v(context)
        query, key, value = (split_heads(a, self.heads) for a in (query, key, value))
        if rope is not None:
            query, key = rotate_adjacent_pairs(query, *rope), rotate_adjacent_pairs(key, *rope)
        attended = self.attention(query, key, value)
        if image is not None:
            key, value = self.norm_added_k(self.add_k_proj(image)), self.add_v_proj(image)
            attended = attended + self.image_attention(query, *(split_heads(a, self.heads) for a in (key, value)))
        return self.to_out["0"](merge_heads(attended))


class WanBlock(nnx.Module):
    """Modulated self-attention, cross-attention to the text without a gate, modulated feed-forward."""

    def __init__(self, config: WanConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        norm = functools.partial(LayerNorm, config.width, epsilon=config.eps)
        self.norm1, self.norm3 = norm(affine=False), norm(affine=False)
        self.norm2 = norm(affine=True, dtype=dtype) if config.cross_attn_norm else None
        self.attn1 = WanAttention(config, to="stream", key=keys[0], dtype=dtype)
        image = config.image_dim is not None
        self.attn2 = WanAttention(config, to="context", key=keys[1], dtype=dtype, image=image)
        self.ffn = FeedForward(config.width, config.ffn_dim, key=keys[2], dtype=dtype)
        table = jax.random.normal(keys[3], (1, 6, config.width), dtype) / config.width**0.5
        self.scale_shift_table = Param(table, axes=(None, None, "embed"), keep_float32=True)

    def __call__(self, x: jax.Array, conditioning: WanConditioning) -> jax.Array:
        """x (batch, tokens, width) -> the same. Norms, modulation and gates are float32 islands."""
        x = constrain(x, "batch", "tokens", None)
        table = at_least_float32(self.scale_shift_table[...]) + conditioning.modulation  # (b, tokens or 1, 6, width)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = (table[..., i, :] for i in range(6))

        normalised = modulate(self.norm1(x), scale, shift, x.dtype)
        attended = self.attn1(normalised, normalised, (conditioning.cosines, conditioning.sines))
        x = (at_least_float32(x) + attended * gate).astype(x.dtype)

        normalised = x if self.norm2 is None else self.norm2(x).astype(x.dtype)
        x = x + self.attn2(normalised, conditioning.context, image=conditioning.image)

        normalised = modulate(self.norm3(x), ffn_scale, ffn_shift, x.dtype)
        return constrain(
            (at_least_float32(x) + self.ffn(normalised) * ffn_gate).astype(x.dtype), "batch", "tokens", None
        )


class ImageEmbedder(nnx.Module):
    """Image embeddings -> tokens: norm, Linear, GELU (exact), Linear, norm."""

    def __init__(self, config: WanConfig, *, key: jax.Array, dtype):
        up, down = jax.random.split(key)
        given, width = config.image_dim, config.width
        layer = {"role": "embedder", "axes": ("embed", None), "dtype": dtype}
        self.norm1 = LayerNorm(given, epsilon=1e-5, affine=True, dtype=dtype)
        first = Linear(given, given, key=up, **layer)
        self.ff = nnx.Dict(
            {"net": nnx.Dict({"0": nnx.Dict({"proj": first}), "2": Linear(given, width, key=down, **layer)})}
        )
        self.norm2 = LayerNorm(width, epsilon=1e-5, affine=True, dtype=dtype)

    def __call__(self, image: jax.Array) -> jax.Array:
        """(batch, image tokens, image_dim) -> (batch, image tokens, width)."""
        net, dtype = self.ff["net"], image.dtype
        hidden = net["0"]["proj"](self.norm1(image).astype(dtype))
        return self.norm2(net["2"](jax.nn.gelu(hidden, approximate=False))).astype(dtype)


class ConditionEmbedder(nnx.Module):
    """Timestep -> embedding and modulation; text embeddings -> context; image embeddings -> tokens."""

    def __init__(self, config: WanConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 6)
        width = config.width
        time = {"role": "time", "axes": ("embed", None), "dtype": dtype, "keep_float32": True}
        text = {"role": "embedder", "axes": ("embed", None), "dtype": dtype}
        self.time_embedder = nnx.Dict({
            "linear_1": Linear(config.freq_dim, width, key=keys[0], **time),
            "linear_2": Linear(width, width, key=keys[1], **time),
        })  # fmt: skip
        self.time_proj = Linear(width, 6 * width, role="modulation", axes=("mlp", "embed"), key=keys[2], dtype=dtype)
        self.text_embedder = nnx.Dict({
            "linear_1": Linear(config.text_dim, width, key=keys[3], **text),
            "linear_2": Linear(width, width, key=keys[4], **text),
        })  # fmt: skip
        self.frequencies = config.freq_dim
        self.image_embedder = None if config.image_dim is None else ImageEmbedder(config, key=keys[5], dtype=dtype)

    def __call__(self, timestep, context, dtype):
        """(batch,) or (batch, tokens), (batch, text tokens, text_dim) -> time embedding, modulation, context."""
        first, second = self.time_embedder["linear_1"], self.time_embedder["linear_2"]
        wide = jnp.promote_types(dtype, jnp.float32)
        sinusoid = timestep_sinusoid(timestep, self.frequencies).astype(wide)
        embedding = second(jax.nn.silu(first(sinusoid))).astype(dtype)  # (batch, [tokens,] width)
        if timestep.ndim == 1:
            embedding = embedding[:, None]  # (batch, 1, width)
        modulation = rearrange(self.time_proj(jax.nn.silu(embedding)), "b t (six d) -> b t six d", six=6)
        hidden = jax.nn.gelu(self.text_embedder["linear_1"](context.astype(dtype)), approximate=True)
        return embedding, at_least_float32(modulation), self.text_embedder["linear_2"](hidden)


class WanModel(VideoModel):
    """The Wan transformer. Tokens are frame-major, then row, then column."""

    def __init__(self, config: WanConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 5)
        self.config = config
        self.patch_embedding = Conv(
            config.in_channels, config.width, config.patch_size, stride=config.patch_size, role="embedder",
            axes=("embed", None), key=keys[0], dtype=dtype,
        )  # fmt: skip
        self.condition_embedder = ConditionEmbedder(config, key=keys[1], dtype=dtype)
        blocks = stacked(lambda k: WanBlock(config, key=k, dtype=dtype), config.num_layers, keys[2])
        self.stacks = nnx.List([Stack(blocks, prefix="blocks", count=config.num_layers)])
        self.norm_out = LayerNorm(config.width, epsilon=config.eps, affine=False)
        patch = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        outputs = config.out_channels * patch
        self.proj_out = Linear(config.width, outputs, role="head", axes=(None, "embed"), key=keys[3], dtype=dtype)
        table = jax.random.normal(keys[4], (1, 2, config.width), dtype) / config.width**0.5
        self.scale_shift_table = Param(table, axes=(None, None, "embed"), keep_float32=True)

    def embed(self, latents, timestep, context, *, image_latents=None, encoder_hidden_states_image=None):
        """Tokens (batch, tokens, width) and conditioning. Computation is in the type of `patch_embedding`.

        Args:
            latents: (batch, frames, height, width, out_channels), or in_channels with the image's at their end.
            timestep: (batch,), or (batch, tokens) as Wan 2.2's TI2V passes it.
            context: (batch, text tokens, text_dim).
            image_latents: Of an image-to-video model, (batch, frames, height, width, in_channels - out_channels): ones
                for the frames that are given, then the latents of the video of these frames and zeros.
            encoder_hidden_states_image: The image's tokens from CLIP before its last block, (batch, image tokens,
                image_dim); needed where the model has an image_dim.

        Raises:
            UserError: Sizes that the patch does not divide, more patches than the rotary table, other channels or
                another text width than the checkpoint's, an image that is missing or one for a model of texts.
        """
        config = self.config
        if image_latents is not None:
            latents = join_image(latents, image_latents)
        _check_sizes(config, latents.shape, context.shape)
        _check_image(config, encoder_hidden_states_image)
        grid = tuple(size // patch for size, patch in zip(latents.shape[1:4], config.patch_size, strict=True))
        dtype = self.patch_embedding.weight[...].dtype
        x = rearrange(self.patch_embedding(latents.astype(dtype)), "b f h w d -> b (f h w) d")
        embedding, modulation, text = self.condition_embedder(timestep, context, dtype)
        text, image = constrain(text, "batch", None, None), None
        if encoder_hidden_states_image is not None:
            image = self.condition_embedder.image_embedder(encoder_hidden_states_image.astype(dtype))
            image = constrain(image, "batch", None, None)
        tables = axial_rope(grid, config.rope_widths, theta=10000.0)
        cosines, sines = (jnp.asarray(table, jnp.promote_types(dtype, jnp.float32)) for table in tables)
        return x, WanConditioning(embedding, modulation, text, image, cosines, sines, grid)

    def token_frames(self, conditioning) -> int:
        """Those of the patches."""
        return conditioning.grid[0]

    def head(self, stream, conditioning):
        """Tokens -> latents; within a patch of the output, channels vary fastest."""
        table = at_least_float32(self.scale_shift_table[...]) + conditioning.time_embedding[..., None, :]
        shift, scale = table[..., 0, :], table[..., 1, :]  # (batch, tokens or 1, width)
        out = self.proj_out(modulate(self.norm_out(stream), scale, shift, stream.dtype))
        (f, h, w), (p, q, r) = conditioning.grid, self.config.patch_size
        pattern = "b (f h w) (p q r c) -> b (f p) (h q) (w r) c"
        return rearrange(out, pattern, f=f, h=h, w=w, p=p, q=q, r=r)


def _check_sizes(config: WanConfig, latents: tuple, context: tuple) -> None:
    about = f", of which {config.image_channels} may come as image_latents" if config.image_channels else ""
    check_channels(latents, config.in_channels, about)
    check_patches(latents[1:4], config.patch)
    for name, size, patch in zip(("frames", "height", "width"), latents[1:4], config.patch, strict=True):
        if size // patch > config.rope_max_seq_len:
            raise UserError(
                f"latent {name} {size} is more than the model's rotary table holds",
                remedy=f"use at most {config.rope_max_seq_len * patch}",
            )
    check_context(context, config.text_dim)


def _check_image(config: WanConfig, image: jax.Array | None) -> None:
    if image is None and config.image_dim is not None:
        raise UserError(
            "this model follows an image, and there is none",
            remedy=f"give encoder_hidden_states_image (batch, tokens, {config.image_dim})",
        )
    if image is not None and (config.image_dim is None or image.ndim != 3 or image.shape[-1] != config.image_dim):
        remedy = "leave it out" if config.image_dim is None else f"give (batch, tokens, {config.image_dim})"
        raise UserError(f"encoder_hidden_states_image of shape {image.shape} does not fit this model", remedy=remedy)
