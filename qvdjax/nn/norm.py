"""Normalisations, computed in at least float32 whatever the type of the stream."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from qvdjax.nn.variables import Param


def at_least_float32(x: jax.Array) -> jax.Array:
    """x in float32, or in its own type where that is wider (float64 parity tests rely on it)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) over the last axis, biased variance, with weight and bias [width] if `affine`."""

    def __init__(self, width: int, *, epsilon: float, affine: bool, axis: str | None = "embed", dtype=jnp.float32):
        make = lambda fill: Param(jnp.full((width,), fill, dtype), axes=(axis,), keep_float32=True)  # noqa: E731
        self.weight, self.bias = (make(1), make(0)) if affine else (None, None)
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape, at least float32."""
        x = at_least_float32(x)
        x = x - x.mean(axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt((x * x).mean(axis=-1, keepdims=True) + self.epsilon)
        return x if self.weight is None else x * self.weight[...] + self.bias[...]


class GroupNorm(nnx.Module):
    """(x - mean) / sqrt(var + eps) over all positions of a sample and the channels of a group, biased variance.

    Attributes:
        weight, bias: [width].
        groups: Neighbouring channels, width / groups of them, share mean and variance.
    """

    def __init__(
        self, width: int, groups: int, *, epsilon: float, axis: str | None = "embed", dtype=jnp.float32
    ):  # fmt: skip
        make = lambda fill: Param(jnp.full((width,), fill, dtype), axes=(axis,), keep_float32=True)  # noqa: E731
        self.weight, self.bias = make(1), make(0)
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, *space, width] -> the same shape, at least float32."""
        grouped = rearrange(at_least_float32(x), "b ... (g c) -> b ... g c", g=self.groups)
        over = (*range(1, x.ndim - 1), x.ndim)  # positions, and channels of a group
        grouped = grouped - grouped.mean(axis=over, keepdims=True)
        grouped = grouped * jax.lax.rsqrt((grouped * grouped).mean(axis=over, keepdims=True) + self.epsilon)
        return rearrange(grouped, "b ... g c -> b ... (g c)") * self.weight[...] + self.bias[...]


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""

    def __init__(self, width: int, *, epsilon: float, axis: str | None = "heads", dtype=jnp.float32):
        self.weight = Param(jnp.ones((width,), dtype), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., width] -> the same shape and type; the sum is taken in at least float32."""
        wide = at_least_float32(x)
        wide = wide * jax.lax.rsqrt((wide * wide).mean(axis=-1, keepdims=True) + self.epsilon)
        return (wide * self.weight[...]).astype(x.dtype)
