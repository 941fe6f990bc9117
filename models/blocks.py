"""Parts of blocks that several families share, under diffusers' names."""

import jax
from flax import nnx

from qvdjax.nn import Linear


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
