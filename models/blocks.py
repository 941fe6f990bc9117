"""Parts of blocks that several families share, under diffusers' names."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import Linear
from qvdjax.nn.embeddings import timestep_sinusoid


def modulate(normalised: jax.Array, scale: jax.Array, shift: jax.Array, dtype) -> jax.Array:
    """Scale and shift in float32, then back to the type of the stream."""
    return (normalised * (1 + scale) + shift).astype(dtype)


class FeedForward(nnx.Module):
    """Linear, tanh-approximated GELU, Linear."""

    def __init__(self, width: int, hidden: int, *, key: jax.Array, dtype):
        up, down = jax.random.split(key)
        wide = Linear(width, hidden, role="feed_forward_in", axes=("mlp", "embed"), key=up, dtype=dtype)
        narrow = Linear(hidden, width, role="feed_forward_out", axes=("embed", "mlp"), key=down, dtype=dtype)
        self.net = nnx.Dict({"0": nnx.Dict({"proj": wide}), "2": narrow})

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, tokens, width) -> the same."""
        return self.net["2"](jax.nn.gelu(self.net["0"]["proj"](x), approximate=True))


class TimestepEmbedding(nnx.Module):
    """Sinusoid, Linear, SiLU, Linear; a float32 island."""

    def __init__(self, frequencies: int, width: int, *, key: jax.Array, dtype):
        keys = jax.random.split(key)
        time = {"role": "time", "axes": ("embed", None), "dtype": dtype, "keep_float32": True}
        self.linear_1 = Linear(frequencies, width, key=keys[0], **time)
        self.linear_2 = Linear(width, width, key=keys[1], **time)
        self.frequencies = frequencies

    def __call__(self, timestep: jax.Array, dtype) -> jax.Array:
        """(batch,) -> (batch, width), in `dtype` and at least float32."""
        wide = jnp.promote_types(dtype, jnp.float32)
        return self.linear_2(jax.nn.silu(self.linear_1(timestep_sinusoid(timestep, self.frequencies).astype(wide))))
