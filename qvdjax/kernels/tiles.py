"""Heads apart without a copy on TPU, which holds activations in tiles of 8 tokens by 128 features.

[batch, tokens, heads x head_dim], as a projection writes it, is in memory [batch, tokens / 8, heads x head_dim / 128,
8, 128]. Seen as [batch, tokens / 8, heads, 8, head_dim], with heads of whole tiles, it stays where it is; seen as
[batch, tokens, heads, head_dim], it is copied, since heads then take the place of tokens in a tile.
"""

import jax
from einops import rearrange

TOKENS, FEATURES = 8, 128


def tile_tokens(tokens: int, head_dim: int) -> int:
    """How many neighbouring tokens to keep together: a tile's, or 1 where tokens or heads are not of whole tiles."""
    return 1 if tokens % TOKENS or head_dim % FEATURES else TOKENS


def in_tiles(x: jax.Array) -> jax.Array:
    """[batch, tokens, heads, head_dim] -> [batch, tiles, heads, tokens of a tile, head_dim]."""
    return rearrange(x, "b (n a) h d -> b n h a d", a=tile_tokens(x.shape[1], x.shape[3]))


def out_of_tiles(x: jax.Array) -> jax.Array:
    """The inverse of `in_tiles`."""
    return rearrange(x, "b n h a d -> b (n a) h d")
