"""Llama as an encoder of texts: that of HunyuanVideo, which reads the state before its last two blocks.

Read in transformers 5.24 `models/llama/modeling_llama.py`; the architecture is that of arXiv 2302.13971 section 2.2,
with fewer heads of keys and values than of queries (arXiv 2305.13245).
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.blocks import merge_heads, split_heads
from models.encoder_blocks import Embedding, attend, seen_before, stream_dtype
from qvdjax.errors import UserError
from qvdjax.nn import Linear, RMSNorm, Stack, stacked
from qvdjax.parallel.rules import constrain

SKIPPED = 2  # blocks, by those who read the state before the last ones


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Fields of transformers' `config.json` that decide what the encoder computes; the defaults are transformers'.

    Newer versions of transformers write `rope_theta` inside `rope_parameters`.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    rope_parameters: dict | None = None
    attention_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self):
        for name in ("rope_scaling", "rope_parameters"):
            found = getattr(self, name)
            if found is not None and found.get("rope_type", found.get("type", "default")) != "default":
                raise UserError(f"{name} is {found}", remedy="Llama with positions that are not stretched is here")
        theta = (self.rope_parameters or {}).get("rope_theta", self.rope_theta)
        object.__setattr__(self, "rope_theta", float(theta))
        for name in ("rope_scaling", "rope_parameters"):
            object.__setattr__(self, name, None)
        if self.hidden_act != "silu":
            raise UserError(f"unknown hidden_act {self.hidden_act!r}", remedy="Llama has 'silu'")
        if self.attention_bias or self.mlp_bias:
            raise UserError("this Llama has biases", remedy="one without them is here")
        if self.num_hidden_layers <= SKIPPED:
            raise UserError(f"{self.num_hidden_layers} blocks", remedy=f"more than {SKIPPED} are needed")
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise UserError(
                f"{self.num_attention_heads} heads of {self.head_dim} features and {self.num_key_value_heads} of keys",
                remedy="mend config.json: their number divides the heads', and their features are even",
            )

    @property
    def width(self) -> int:
        """Features of a token's state."""
        return self.hidden_size

    @property
    def most_tokens(self) -> int:
        """Length of the longest text it was trained on."""
        return self.max_position_embeddings

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return {"architectures": ["LlamaModel"], "model_type": "llama", **fields}


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["counts", "cosines", "sines"], meta_fields=[]
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class LlamaConditioning:
    """What the blocks read.

    Attributes:
        counts: (batch or 1, 1, queries, keys) bool, which tokens a token sees: those before it, and itself.
        cosines, sines: (tokens, 1, head_dim / 2) of its position.
    """

    counts: jax.Array
    cosines: jax.Array
    sines: jax.Array


def rotated(x: jax.Array, conditioning: LlamaConditioning) -> jax.Array:
    """x (batch, tokens, heads, head_dim), its first and second half turned against each other by position."""
    first, second = jnp.split(x, 2, axis=-1)
    cosines, sines = (table.astype(x.dtype) for table in (conditioning.cosines, conditioning.sines))
    return jnp.concatenate([first * cosines - second * sines, second * cosines + first * sines], axis=-1)


class LlamaAttention(nnx.Module):
    """Self-attention on what came before; several heads share keys and values."""

    def __init__(self, config: LlamaConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        make = functools.partial(Linear, bias=False, dtype=dtype)
        width, heads, shared = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
        self.q_proj, self.k_proj, self.v_proj = (
            make(width, count * config.head_dim, role=role, axes=("heads", "embed"), key=k)
            for role, count, k in zip(("query", "key", "value"), (heads, shared, shared), keys[:3], strict=True)
        )
        self.o_proj = make(
            heads * config.head_dim, width, role="attention_output", axes=("embed", "heads"), key=keys[3]
        )
        self.heads, self.shared = heads, shared

    def __call__(self, x: jax.Array, conditioning: LlamaConditioning) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        query = rotated(split_heads(self.q_proj(x), self.heads), conditioning)
        key = rotated(split_heads(self.k_proj(x), self.shared), conditioning)
        value = split_heads(self.v_proj(x), self.shared)
        # b k (shared d) -> b k (shared times) d: neighbouring heads share one
        key, value = (jnp.repeat(a, self.heads // self.shared, axis=2) for a in (key, value))
        mixed = attend(query, key, value, scale=query.shape[-1] ** -0.5, counts=conditioning.counts)
        return self.o_proj(merge_heads(mixed))


class LlamaFeedForward(nnx.Module):
    """silu(x W_gate) * (x W_up), then back."""

    def __init__(self, config: LlamaConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        width, hidden = config.hidden_size, config.intermediate_size
        wide = {"role": "feed_forward_in", "axes": ("mlp", "embed"), "bias": False, "dtype": dtype}
        self.gate_proj = Linear(width, hidden, key=keys[0], **wide)
        self.up_proj = Linear(width, hidden, key=keys[1], **wide)
        self.down_proj = Linear(
            hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=keys[2], bias=False, dtype=dtype
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nnx.Module):
    """Attention, then feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: LlamaConfig, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        self.input_layernorm, self.post_attention_layernorm = (norm_of(config, dtype) for _ in range(2))
        self.self_attn = LlamaAttention(config, key=keys[0], dtype=dtype)
        self.mlp = LlamaFeedForward(config, key=keys[1], dtype=dtype)

    def __call__(self, x: jax.Array, conditioning: LlamaConditioning) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        x = constrain(x, "batch", None, None)
        x = x + self.self_attn(self.input_layernorm(x), conditioning)
        return x + self.mlp(self.post_attention_layernorm(x))


def norm_of(config: LlamaConfig, dtype) -> RMSNorm:
    """A norm over a token's features."""
    return RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, axis="embed", dtype=dtype)


class LlamaEncoder(nnx.Module):
    """Tokens of texts -> their states. Names of parameters are those of transformers' LlamaModel.

    The last blocks are a stack of their own, so that who skips them computes nothing of them.
    """

    recipe_name: str = ""

    def __init__(self, config: LlamaConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, key=keys[0], dtype=dtype)
        first, make = config.num_hidden_layers - SKIPPED, lambda k: LlamaBlock(config, key=k, dtype=dtype)
        self.stacks = nnx.List([
            Stack(stacked(make, count, k), prefix="layers", start=start, count=count)
            for start, count, k in ((0, first, keys[1]), (first, SKIPPED, keys[2]))
        ])  # fmt: skip
        self.norm = norm_of(config, dtype)

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, *, output: Literal["tokens", "skipped"] = "tokens"
    ) -> jax.Array:
        """Encode.

        Args:
            tokens: (batch, tokens) whole numbers below `vocab_size`.
            mask: (batch, tokens), zero for padding, which no token looks at; it comes after the text.
            output: The last state, normalised, or that before the last two blocks, as it is.

        Returns:
            (batch, tokens, hidden_size), also of padding.
        """
        length, width = tokens.shape[1], self.config.head_dim
        angles = np.arange(length)[:, None] * self.config.rope_theta ** -(np.arange(0, width, 2) / width)
        dtype = stream_dtype(self.embed_tokens.weight[...])
        wide = jnp.promote_types(dtype, jnp.float32)
        cosines, sines = (jnp.asarray(table[:, None], wide) for table in (np.cos(angles), np.sin(angles)))
        conditioning = LlamaConditioning(seen_before(length, mask), cosines, sines)
        x = self.embed_tokens(tokens).astype(dtype)  # (batch, tokens, width)
        for stack in list(self.stacks)[: -1 if output == "skipped" else None]:
            x, _ = stack(x, conditioning)
        return x if output == "skipped" else self.norm(x)
