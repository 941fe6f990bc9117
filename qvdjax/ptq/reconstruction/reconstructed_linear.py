"""A linear layer during reconstruction: what meets in its product is trained, by one of several modules."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import LayerScheme, Linear
from qvdjax.numerics import fake_quantize, fake_quantize_dynamic
from qvdjax.ptq.reconstruction.flattened_weight import LearnedClip


class ReconstructedLinear(nnx.Module):
    """A Linear that is computed as its quantized form will be, as far as its weight is rounded by now.

    Attributes:
        linear: The layer, not trained.
        operands: Makes (transformed input, rounded weight) of (input, weight [out, in]), and says with `learned()` what
            was found: a `FlattenedWeight`, an `AdaptivelyRoundedWeight` or a `SteppedWeight`.
        estimator: What is added to the product for what rounding takes off it (a `LearnedEstimator`), or None.
        input_clip: [1, sides] logits of the input's dynamic range, or None.
        input_scale, input_zero_point: [1, 1] of a static range of the input, not trained, or None.
    """

    def __init__(
        self, linear: Linear, scheme: LayerScheme, operands: nnx.Module, edges: tuple,
        estimator: nnx.Module | None = None,
    ):  # fmt: skip
        """`edges` are smallest and largest value, [] each, of the transformed input, if its range is static."""
        self.linear, self.scheme, self.role, self.axes = linear, scheme, linear.role, linear.axes
        self.operands, self.estimator = operands, estimator
        sides = 1 if scheme.activation is None or scheme.activation.symmetric else 2
        self.input_clip = None if scheme.input_clip is None else LearnedClip.started((1, sides))
        static = (None, None)
        if scheme.activation is not None and not scheme.activation.dynamic:
            static = scheme.activation.grid.from_range(*(jnp.reshape(edge, (1, 1)) for edge in edges))  # [] -> [1, 1]
        self.input_scale, self.input_zero_point = (
            None if a is None else nnx.Variable(a, axes=(None, None)) for a in static
        )

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
        dtype = x.dtype
        x, weight = self._operands(x)
        x = self._rounded(x)
        # The stream's type, as the product of integers is written in it; ranges and rounding are float32.
        y = jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
        if self.estimator is not None:
            y = (y + self.estimator(x)).astype(dtype)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def rounded(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., tokens, in] -> the input that meets the weight, before and after its rounding."""
        x, _ = self._operands(x)
        return x, self._rounded(x)

    def _operands(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        weight = self.linear.weight[...]
        return self.operands(x, weight.astype(jnp.promote_types(weight.dtype, jnp.float32)))

    def _rounded(self, x: jax.Array) -> jax.Array:
        if self.input_scale is not None:
            zero_point = None if self.input_zero_point is None else self.input_zero_point[...]
            return fake_quantize(x, self.scheme.activation.grid, self.input_scale[...], zero_point)
        if (quantizer := self.scheme.activation) is not None and self.input_clip is None:
            # The range takes no gradient: that of a maximum looks for the place that equals it, and where XLA computes
            # x anew in the backward pass, to another last bit, there is none, and 0 / 0.
            return fake_quantize_dynamic(x, quantizer)
        if quantizer is not None:
            # The range takes part in the gradient, as in FlatQuant's code.
            return fake_quantize(x, quantizer.grid, *quantizer.scale_of(x, self._input_factors()))
        return x

    def _input_factors(self):
        factors = self.input_clip.factors()  # [1, sides]
        return factors[:, :1], factors[:, -1:]

    def learned(self) -> dict[str, Any]:
        """What `qvdjax.ptq.layers.quantized_arrays` takes: `input_clip`, `estimator`, and what the operands say."""
        found = self.operands.learned()
        if self.estimator is not None:
            found["estimator"] = self.estimator.learned()
        return found if self.input_clip is None else {**found, "input_clip": self.input_clip.factors()}
