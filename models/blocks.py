"""Parts of blocks that several families share, under diffusers' names."""

from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from qvdjax.nn import Linear, Role
from qvdjax.nn.embeddings import timestep_sinusoid


def modulate(normalised: jax.Array, scale: jax.Array, shift: jax.Array, dtype) -> jax.Array:
    """Scale and shift in float32, then back to the type of the stream."""
    return (normalised * (1 + scale) + shift).astype(dtype)


def query_key_value(width: int, keys: jax.Array, *, dtype, bias: bool = True) -> tuple[Linear, Linear, Linear]:
    """The three projections of an attention, width -> heads, from three keys."""
    across = {"axes": ("heads", "embed"), "dtype": dtype, "bias": bias}
    return tuple(
        Linear(width, width, role=role, key=key, **across)
        for role, key in zip(("query", "key", "value"), keys, strict=True)
    )


def split_heads(x: jax.Array, heads: int) -> jax.Array:
    """(batch, tokens, heads x head_dim) -> (batch, tokens, heads, head_dim)."""
    return rearrange(x, "b t (h d) -> b t h d", h=heads)


def merge_heads(x: jax.Array) -> jax.Array:
    """(batch, tokens, heads, head_dim) -> (batch, tokens, heads x head_dim)."""
    return rearrange(x, "b t h d -> b t (h d)")


class FeedForward(nnx.Module):
    """Linear, tanh-approximated GELU (or SiLU), Linear."""

    def __init__(
        self, width: int, hidden: int, *, key: jax.Array, dtype,
        activation: Literal["gelu-approximate", "linear-silu"] = "gelu-approximate",
    ):  # fmt: skip
        up, down = jax.random.split(key)
        wide = Linear(width, hidden, role="feed_forward_in", axes=("mlp", "embed"), key=up, dtype=dtype)
        narrow = Linear(hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=down, dtype=dtype)
        self.net = nnx.Dict({"0": nnx.Dict({"proj": wide}), "2": narrow})
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, width) -> the same."""
        hidden = self.net["0"]["proj"](x)
        if self.activation == "linear-silu":
            return self.net["2"](jax.nn.silu(hidden))
        return self.net["2"](jax.nn.gelu(hidden, approximate=True))


class TimestepEmbedding(nnx.Module):
    """Sinusoid of a number, or of several side by side, Linear, SiLU, Linear; a float32 island.

    Args:
        frequencies: Features of a number's sinusoid.
        width: Features inside, and of the result.
        numbers: How many are embedded together.
        out: Features of the result where they are not `width`.
    """

    def __init__(
        self, frequencies: int, width: int, *, key: jax.Array, dtype, role: Role = "time", numbers: int = 1,
        out: int | None = None,
    ):  # fmt: skip
        keys = jax.random.split(key)
        island = {"role": role, "axes": ("embed", None), "dtype": dtype, "keep_float32": True}
        self.linear_1 = Linear(numbers * frequencies, width, key=keys[0], **island)
        self.linear_2 = Linear(width, width if out is None else out, key=keys[1], **island)
        self.frequencies = frequencies

    def __call__(self, timestep: jax.Array, dtype) -> jax.Array:
        """(batch,), or (batch, numbers) of several -> (batch, out), in `dtype` and at least float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        sinusoid = timestep_sinusoid(timestep, self.frequencies).astype(wide)  # (batch, [numbers,] frequencies)
        sinusoid = sinusoid.reshape(len(sinusoid), -1)  # b [n] f -> b ([n] f)
        return self.linear_2(jax.nn.silu(self.linear_1(sinusoid)))
