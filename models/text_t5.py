"""The encoders of T5 v1.1 (CogVideoX's texts) and UMT5 (Wan's), which differ in who has a table of relative positions.

Read in transformers 5.24 `models/t5/modeling_t5.py` and `models/umt5/modeling_umt5.py`; the architectures are those of
arXiv 1910.10683 section 2.1 (gated GELU: arXiv 2002.05202) and arXiv 2304.09151.
"""

import dataclasses
import functools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from models.blocks import merge_heads, split_heads
from models.encoder_blocks import Embedding, attend, stream_dtype
from qvdjax.errors import UserError
from qvdjax.nn import Linear, RMSNorm, Stack, stacked
from qvdjax.parallel.rules import constrain


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Fields of transformers' `config.json` that decide what the encoder computes; the defaults are transformers'."""

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"

    architecture: ClassVar[str] = "T5EncoderModel"
    model_type: ClassVar[str] = "t5"
    bias_in_every_block: ClassVar[bool] = False

    def __post_init__(self):
        if self.feed_forward_proj != "gated-gelu":
            raise UserError(
                f"this {self.model_type} encoder has the feed-forward {self.feed_forward_proj!r}",
                remedy="T5 v1.1 and UMT5, which have 'gated-gelu', are here",
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or buckets % 4 or distance <= buckets // 4:
            raise UserError(
                f"{buckets} buckets of relative positions up to {distance} cannot be",
                remedy="their number is a multiple of 4, and the distance is more than a quarter of it",
            )

    @property
    def width(self) -> int:
        """Features of a token's embedding."""
        return self.d_model

    @property
    def most_tokens(self) -> int | None:
        """Length of the longest text; None for any, because positions are relative."""
        return None

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return {"architectures": [self.architecture], "model_type": self.model_type, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class UMT5Config(T5Config):
    """The same for UMT5, in which every block has its own table of relative positions."""

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"

    architecture: ClassVar[str] = "UMT5EncoderModel"
    model_type: ClassVar[str] = "umt5"
    bias_in_every_block: ClassVar[bool] = True


def relative_buckets(tokens: int, buckets: int, distance: int) -> np.ndarray:
    """int32 (queries, keys): which entry of the table of biases a query and a key have.

    Half of the buckets are for keys after the query. Of each half one half is for single distances, the rest for
    distances that grow by a factor up to `distance`; those beyond share the last. The logarithm is float32's, as in
    transformers: at powers of two its last bit decides the bucket.
    """
    positions = np.arange(tokens)
    offset = positions[None, :] - positions[:, None]  # (queries, keys)
    half = buckets // 2
    single = half // 2
    far = np.abs(offset)
    ratio = np.log(np.maximum(far, 1).astype(np.float32) / np.float32(single)) / np.float32(math.log(distance / single))
    grown = np.minimum(single + (ratio * np.float32(half - single)).astype(np.int32), half - 1)
    return (np.where(offset > 0, half, 0) + np.where(far < single, far, grown)).astype(np.int32)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["counts", "buckets", "bias"], meta_fields=[]
)  # fmt: skip
@dataclasses.dataclass(frozen=True)
class T5Conditioning:
    """What the blocks read.

    Attributes:
        counts: (batch, 1, 1, keys) bool, which tokens are not padding; None where all are looked at.
        buckets: (queries, keys), see `relative_buckets`.
        bias: (heads, queries, keys) of all blocks; None where every block has its own.
    """

    counts: jax.Array | None
    buckets: jax.Array
    bias: jax.Array | None


def position_bias(table: Embedding, buckets: jax.Array) -> jax.Array:
    """(queries, keys) -> (heads, queries, keys)."""
    return rearrange(table(buckets), "q k h -> h q k")


class T5Attention(nnx.Module):
    """Self-attention without scaling; scores get a bias by relative position."""

    def __init__(self, config: T5Config, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 5)
        inner = config.num_heads * config.d_kv
        make = functools.partial(Linear, bias=False, dtype=dtype)
        self.q, self.k, self.v = (
            make(config.d_model, inner, role=role, axes=("heads", "embed"), key=k)
            for role, k in zip(("query", "key", "value"), keys[:3], strict=True)
        )
        self.o = make(inner, config.d_model, role="attention_output", axes=("embed", "heads"), key=keys[3])
        self.relative_attention_bias = _bias_table(config, keys[4], dtype) if config.bias_in_every_block else None
        self.heads = config.num_heads

    def __call__(self, x: jax.Array, conditioning: T5Conditioning) -> jax.Array:
        """x (batch, tokens, d_model) -> the same."""
        query, key, value = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        table = self.relative_attention_bias
        bias = conditioning.bias if table is None else position_bias(table, conditioning.buckets)
        return self.o(merge_heads(attend(query, key, value, scale=1.0, bias=bias, counts=conditioning.counts)))


def _bias_table(config: T5Config, key: jax.Array, dtype) -> Embedding:
    return Embedding(
        config.relative_attention_num_buckets, config.num_heads, key=key, dtype=dtype, axes=(None, None)
    )  # fmt: skip


class GatedFeedForward(nnx.Module):
    """gelu(x W_0) * (x W_1), then back; GELU by tanh, and no biases."""

    def __init__(self, config: T5Config, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 3)
        wide = {"role": "feed_forward_in", "axes": ("mlp", "embed"), "bias": False, "dtype": dtype}
        self.wi_0 = Linear(config.d_model, config.d_ff, key=keys[0], **wide)
        self.wi_1 = Linear(config.d_model, config.d_ff, key=keys[1], **wide)
        self.wo = Linear(
            config.d_ff, config.d_model, role="feed_forward_out", axes=("embed", "mlp"), key=keys[2], bias=False,
            dtype=dtype,
        )  # fmt: skip

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, tokens, d_model) -> the same."""
        return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))


class T5Block(nnx.Module):
    """Self-attention, then feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: T5Config, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        norm = functools.partial(
            RMSNorm, config.d_model, epsilon=config.layer_norm_epsilon, axis="embed", dtype=dtype
        )  # fmt: skip
        attention = T5Attention(config, key=keys[0], dtype=dtype)
        feed_forward = GatedFeedForward(config, key=keys[1], dtype=dtype)
        self.layer = nnx.Dict({
            "0": nnx.Dict({"SelfAttention": attention, "layer_norm": norm()}),
            "1": nnx.Dict({"DenseReluDense": feed_forward, "layer_norm": norm()}),
        })  # fmt: skip

    def __call__(self, x: jax.Array, conditioning: T5Conditioning) -> jax.Array:
        """x (batch, tokens, d_model) -> the same."""
        attention, feed_forward = self.layer["0"], self.layer["1"]
        x = constrain(x, "batch", None, None)
        x = x + attention["SelfAttention"](attention["layer_norm"](x), conditioning)
        return x + feed_forward["DenseReluDense"](feed_forward["layer_norm"](x))


class T5Encoder(nnx.Module):
    """Tokens of texts -> their embeddings.

    Names of parameters are transformers'. The first block's table of relative positions, which all blocks of T5 share,
    lies outside the stack of blocks.
    """

    recipe_name: str = ""

    def __init__(self, config: T5Config, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 3)
        self.config = config
        self.shared = Embedding(config.vocab_size, config.d_model, key=keys[0], dtype=dtype)
        blocks = stacked(lambda k: T5Block(config, key=k, dtype=dtype), config.num_layers, keys[1])
        self.stacks = nnx.List([Stack(blocks, prefix="encoder.block", count=config.num_layers)])
        norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, axis="embed", dtype=dtype)
        outside = {"final_layer_norm": norm}
        if not config.bias_in_every_block:
            attention = nnx.Dict({"relative_attention_bias": _bias_table(config, keys[2], dtype)})
            layers = nnx.Dict({"0": nnx.Dict({"SelfAttention": attention})})
            outside["block"] = nnx.Dict({"0": nnx.Dict({"layer": layers})})
        self.encoder = nnx.Dict(outside)

    def __call__(self, tokens: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Encode.

        Args:
            tokens: (batch, tokens) whole numbers below `vocab_size`.
            mask: (batch, tokens), zero for padding, which no token looks at; None: all tokens are looked at.

        Returns:
            (batch, tokens, d_model), also of padding.
        """
        config = self.config
        buckets = relative_buckets(
            tokens.shape[1], config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        bias = None
        if not config.bias_in_every_block:
            table = self.encoder["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]
            bias = position_bias(table, buckets)
        counts = None if mask is None else rearrange(mask != 0, "b k -> b 1 1 k")
        conditioning = T5Conditioning(counts, jnp.asarray(buckets), bias)
        x = self.shared(tokens).astype(stream_dtype(self.shared.weight[...]))  # (batch, tokens, d_model)
        for stack in self.stacks:
            x, _ = stack(x, conditioning)
        return self.encoder["final_layer_norm"](x)
