"""Heads apart without a copy on TPU, which holds activations in tiles of 8 tokens by 128 features.

[batch, tokens, heads x head_dim], as a projection writes it, is in memory [batch, tokens / 8, heads x head_dim / 128,
8, 128]. Seen as [batch, tokens / 8, heads, 8, head_dim], with heads of whole tiles, it stays where it is; seen as
[batch, tokens, heads, head_dim], it is copied, since heads then take the place of tokens in a tile.
"""

import jax
from einops import rearrange

TOKENS, FEATURES = 8, 128


def in_tiles(x: jax.Array, parts: int = 1) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> [batch, tiles, heads, tokens of a tile, head_dim].

    A tile is of one token where a device's tokens or heads are not of whole tiles.

    Args:
        x: [batch, tokens, heads, head_dim].
        parts: By how many devices tokens are split.
    """
    _, tokens, _, head_dim = x.shape
    together = 1 if tokens % (TOKENS * parts) or head_dim % FEATURES else TOKENS
    return rearrange(x, "b (n a) h d -> b n h a d", a=together)


def out_of_tiles(x: jax.Array) -> jax.Array:
    """The inverse of `in_tiles`."""
    return rearrange(x, "b n h a d -> b (n a) h d")
