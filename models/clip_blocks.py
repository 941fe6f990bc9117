"""What CLIP's encoders of texts and of images share.

Read in transformers 5.24 `models/clip/modeling_clip.py`; the architecture is that of arXiv 2103.00020.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import nnx

from models.blocks import merge_heads, split_heads
from models.encoder_blocks import attend
from qvdjax.errors import UserError
from qvdjax.nn import LayerNorm, Linear, Stack, stacked
from qvdjax.parallel.rules import constrain

ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def check_clip(config: Any, plain: str, projected: str) -> None:
    """UserError for a configuration of either encoder that is not here.

    Its `architectures` becomes a tuple of one, of the model without or with a projection of the pooled vector.
    """
    if config.hidden_act not in ACTIVATIONS:
        raise UserError(f"unknown hidden_act {config.hidden_act!r}", remedy=f"CLIP has {' or '.join(ACTIVATIONS)}")
    if config.hidden_size % config.num_attention_heads:
        raise UserError(
            f"hidden_size {config.hidden_size} is no multiple of {config.num_attention_heads} heads",
            remedy="mend config.json",
        )
    named = (plain,) if config.architectures is None else tuple(config.architectures)
    if named not in ((plain,), (projected,)):
        raise UserError(
            f"config.json: architectures is {config.architectures!r}",
            remedy=f"it must be [{plain!r}] or, with a projection of the pooled vector, [{projected!r}]",
        )
    object.__setattr__(config, "architectures", named)


class CLIPAttention(nnx.Module):
    """Self-attention; a text's tokens see those before them and themselves."""

    def __init__(self, config: Any, *, key: jax.Array, dtype):
        keys = jax.random.split(key, 4)
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj = (
            Linear(width, width, role=role, axes=("heads", "embed"), key=k, dtype=dtype)
            for role, k in zip(("query", "key", "value"), keys[:3], strict=True)
        )
        self.out_proj = Linear(
            width, width, role="attention_output", axes=("embed", "heads"), key=keys[3], dtype=dtype
        )  # fmt: skip
        self.heads = config.num_attention_heads

    def __call__(self, x: jax.Array, counts: jax.Array | None) -> jax.Array:
        """x (batch, tokens, width) -> the same; `counts` as in `attend`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (split_heads(project(x), self.heads) for project in projections)
        return self.out_proj(merge_heads(attend(query, key, value, scale=query.shape[-1] ** -0.5, counts=counts)))


class CLIPFeedForward(nnx.Module):
    """Linear, GELU, Linear."""

    def __init__(self, config: Any, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        width, hidden = config.hidden_size, config.intermediate_size
        self.fc1 = Linear(width, hidden, role="feed_forward_in", axes=("mlp", "embed"), key=keys[0], dtype=dtype)
        self.fc2 = Linear(hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=keys[1], dtype=dtype)
        self.activation = config.hidden_act

    def __call__(self, x: jax.Array) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPBlock(nnx.Module):
    """Attention, then feed-forward, each after a norm and added to the stream."""

    def __init__(self, config: Any, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        self.layer_norm1, self.layer_norm2 = (norm_of(config, dtype) for _ in range(2))
        self.self_attn = CLIPAttention(config, key=keys[0], dtype=dtype)
        self.mlp = CLIPFeedForward(config, key=keys[1], dtype=dtype)

    def __call__(self, x: jax.Array, counts: jax.Array | None) -> jax.Array:
        """x (batch, tokens, width) -> the same."""
        x = constrain(x, "batch", None, None)
        x = x + self.self_attn(self.layer_norm1(x).astype(x.dtype), counts)
        return x + self.mlp(self.layer_norm2(x).astype(x.dtype))


def norm_of(config: Any, dtype) -> LayerNorm:
    """A norm over a token's features."""
    return LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, affine=True, dtype=dtype)


def blocks_of(config: Any, prefix: str, *, key: jax.Array, dtype) -> nnx.List:
    """All blocks, named `<prefix>.<number>`, as one stack."""
    count = config.num_hidden_layers
    blocks = stacked(lambda k: CLIPBlock(config, key=k, dtype=dtype), count, key)
    return nnx.List([Stack(blocks, prefix=prefix, count=count)])


def fields_of(config: Any, model_type: str) -> dict:
    """The fields as transformers' `config.json` holds them."""
    return {**dataclasses.asdict(config), "model_type": model_type, "architectures": [*config.architectures]}
