"""How much each token counts when a block's output is compared with the full-precision one."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

Normalisation = Literal["minmax", "percentile"]


@dataclasses.dataclass(frozen=True)
class TokenWeights:
    """Weights between `least` and 1 by the attention that tokens get (S2Q-VDiT, arXiv 2508.04016, equation 11).

    Attributes:
        normalisation: "minmax" over the tokens of a sample, as published. A few tokens get nearly all attention in real
            models, so nearly all weights are then `least`; "percentile" takes a token's rank instead.
        least: Of the token that gets least.
        text: Whether text tokens of a stream count; the source does not say.
    """

    normalisation: Normalisation = "minmax"
    least: float = 0.5
    text: bool = True

    def __post_init__(self):
        if self.normalisation not in get_args(Normalisation):
            raise ValueError(f"weights are made by {' or '.join(get_args(Normalisation))}, not {self.normalisation!r}")
        if not 0 <= self.least <= 1:
            raise ValueError(f"the least weight must lie in 0 to 1, not {self.least}")

    def of(self, received: jax.Array, video: slice) -> jax.Array:
        """Weights (batch, tokens) of the attention that tokens got (batch, tokens); `video` are those of the video.

        Tokens that got none at all are padding, and weigh nothing.
        """
        counts = received > 0
        if not self.text:
            is_video = jnp.zeros(received.shape[-1], bool).at[video].set(True)
            counts = counts & is_video
        if self.normalisation == "minmax":
            least = jnp.where(counts, received, jnp.inf).min(axis=-1, keepdims=True)
            most = jnp.where(counts, received, -jnp.inf).max(axis=-1, keepdims=True)
            share = (received - least) / jnp.where(most > least, most - least, 1)
        else:
            ordered = jnp.sort(jnp.where(counts, received, jnp.inf), axis=-1)
            rank = jax.vmap(jnp.searchsorted)(ordered, received)  # of equals the first
            share = rank / jnp.maximum(counts.sum(axis=-1, keepdims=True) - 1, 1)
        return jnp.where(counts, self.least + (1 - self.least) * share, 0).astype(jnp.float32)
