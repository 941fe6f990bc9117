"""A linear layer during reconstruction: frozen weight, trained transform and clips, rounding straight through."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import InputTransform, LayerScheme, Linear
from qvdjax.numerics import fake_quantize
from qvdjax.ptq.reconstruction.learned_transform import Learned, LearnedTransform


class LearnedClip(Learned):
    """Logits of a clip: the sigmoid is by how much an end of a range is narrowed."""


CLIP_START = 4.0  # FlatQuant's: sigmoid 0.982


class ReconstructedLinear(nnx.Module):
    """A Linear that is computed as its quantized form will be, but for the rounding of its weight, which is to the
    nearest code here.

    Attributes:
        linear: The layer, not trained.
        transform: What its input passes through, or None.
        weight_clip: [2, out or 1, 1] logits of low and high ends of the weight's ranges, or None.
        input_clip: [1, sides] logits of the input's dynamic range, or None.
    """

    def __init__(self, linear: Linear, scheme: LayerScheme, start: InputTransform | None):
        self.linear, self.scheme, self.role, self.axes = linear, scheme, linear.role, linear.axes
        self.transform = None if start is None else LearnedTransform(start)
        rows = 1 if scheme.weight is None or scheme.weight.granularity == "tensor" else len(linear.weight[...])
        sides = 1 if scheme.activation is None or scheme.activation.symmetric else 2
        self.weight_clip = None if scheme.weight is None else _clip((2, rows, 1))
        self.input_clip = None if scheme.input_clip is None else _clip((1, sides))

    @property
    def weight(self):
        """The layer's weight, which some models read for its dtype."""
        return self.linear.weight

    @property
    def bias(self):
        """The layer's bias, likewise."""
        return self.linear.bias

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in] -> [..., tokens, out], in x's type."""
        dtype, weight = x.dtype, self.linear.weight[...]
        weight = weight.astype(jnp.promote_types(weight.dtype, jnp.float32))
        if self.transform is not None:
            x, weight = self.transform(x, weight)
        if self.scheme.weight is not None:
            weight = _rounded(weight, self.scheme.weight, self._weight_factors())
        if self.scheme.activation is not None:
            x = _rounded(x, self.scheme.activation, self._input_factors())
        # The stream's type, as the product of integers is written in it; ranges and rounding are float32.
        y = jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def _weight_factors(self):
        low, high = jax.nn.sigmoid(self.weight_clip[...])
        return low, high

    def _input_factors(self):
        if self.input_clip is None:
            return None
        factors = jax.nn.sigmoid(self.input_clip[...])  # [1, sides]
        return factors[:, :1], factors[:, -1:]

    def learned(self) -> dict[str, Any]:
        """What `qvdjax.ptq.layers.quantized_arrays` takes: transform, weight_clip, input_clip."""
        found: dict[str, Any] = {}
        if self.transform is not None:
            found["transform"] = self.transform.transform().arrays()
        if self.weight_clip is not None:
            found["weight_clip"] = self._weight_factors()
        if self.input_clip is not None:
            found["input_clip"] = jax.nn.sigmoid(self.input_clip[...])
        return found


def _clip(shape: tuple[int, ...]) -> LearnedClip:
    return LearnedClip(jnp.full(shape, CLIP_START, jnp.float32), axes=(None,) * len(shape))


def _rounded(x: jax.Array, quantizer, clip) -> jax.Array:
    """x on its grid. The range takes part in the gradient, as in FlatQuant's code."""
    return fake_quantize(x, quantizer.grid, *quantizer.scale_of(x, clip))
