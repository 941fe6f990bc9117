"""CLIP's encoder of texts: that of AnimateDiff, ModelScope and, pooled, of HunyuanVideo.

Read in transformers 5.24 `models/clip/modeling_clip.py` (CLIPTextModel, CLIPTextModelWithProjection).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from models.clip_blocks import blocks_of, check_clip, fields_of, norm_of
from models.encoder_blocks import Embedding, seen_before, stream_dtype
from qvdjax.errors import UserError
from qvdjax.nn import Linear

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Fields of transformers' `config.json` that decide what the encoder computes; the defaults are transformers'.

    `architectures` says whether there is a projection of the pooled vector.
    """

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    architectures: tuple[str, ...] | None = None

    def __post_init__(self):
        check_clip(self, PLAIN, PROJECTED)

    @property
    def width(self) -> int:
        """Features of a token's embedding."""
        return self.hidden_size

    @property
    def most_tokens(self) -> int:
        """Length of the longest text: as many as there are positions."""
        return self.max_position_embeddings

    @property
    def projected(self) -> bool:
        """Whether the pooled vector is projected."""
        return self.architectures == (PROJECTED,)

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return fields_of(self, "clip_text_model")


def eos_positions(tokens: jax.Array, eos_token_id: int) -> jax.Array:
    """(batch, tokens) -> (batch,): where the pooled vector is taken.

    The first token that ends a text; with `eos_token_id` 2, which configurations of the first years wrongly say, the
    first of the largest number, which is what ends a text in CLIP's own vocabulary.
    """
    return (tokens if eos_token_id == 2 else tokens == eos_token_id).argmax(axis=-1)


class CLIPTextEncoder(nnx.Module):
    """Tokens of texts -> their embeddings, and one vector a text. Names of parameters are transformers'."""

    recipe_name: str = ""

    def __init__(self, config: CLIPTextConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 4)
        self.config = config
        width = config.hidden_size
        self.text_model = nnx.Dict({
            "embeddings": nnx.Dict({
                "token_embedding": Embedding(config.vocab_size, width, key=keys[0], dtype=dtype),
                "position_embedding": Embedding(config.max_position_embeddings, width, key=keys[1], dtype=dtype),
            }),
            "final_layer_norm": norm_of(config, dtype),
        })  # fmt: skip
        self.stacks = blocks_of(config, "text_model.encoder.layers", key=keys[2], dtype=dtype)
        self.text_projection = Linear(
            width, config.projection_dim, role="head", axes=(None, "embed"), key=keys[3], dtype=dtype, bias=False
        ) if config.projected else None  # fmt: skip

    def __call__(
        self, tokens: jax.Array, mask: jax.Array | None = None, *, output: Literal["tokens", "pooled"] = "tokens"
    ) -> jax.Array:
        """Encode.

        Args:
            tokens: (batch, tokens) whole numbers below `vocab_size`.
            mask: (batch, tokens), zero for padding, which no token looks at. Diffusion models are trained without one:
                padding comes after the text, so that no token of the text sees it anyway.
            output: The last hidden state of every token, normalised, or what it is at the end of the text, and
                projected where the model has a projection.

        Returns:
            (batch, tokens, hidden_size), or (batch, hidden_size or projection_dim).

        Raises:
            UserError: More tokens than positions.
        """
        length = tokens.shape[1]
        if length > self.config.max_position_embeddings:
            raise UserError(
                f"a text of {length} tokens", remedy=f"this encoder takes {self.config.max_position_embeddings} at most"
            )
        embeddings = self.text_model["embeddings"]
        dtype = stream_dtype(embeddings["token_embedding"].weight[...])
        x = embeddings["token_embedding"](tokens) + embeddings["position_embedding"](jnp.arange(length))
        counts = seen_before(length, mask)
        x = x.astype(dtype)  # (batch, tokens, width)
        for stack in self.stacks:
            x, _ = stack(x, counts)
        x = self.text_model["final_layer_norm"](x).astype(dtype)
        if output == "tokens":
            return x
        pooled = x[jnp.arange(len(x)), eos_positions(tokens, self.config.eos_token_id)]  # (batch, width)
        return pooled if self.text_projection is None else self.text_projection(pooled)
