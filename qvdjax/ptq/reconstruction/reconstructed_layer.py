"""A layer during reconstruction: its input is rounded as it will be, and what meets it in the product is trained."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import Conv, InputTransform, LayerScheme, Linear, StandIn, rounded_apart
from qvdjax.nn.quantized_layer import StaticRanges
from qvdjax.numerics import fake_quantize, fake_quantize_dynamic, to_levels
from qvdjax.ptq.layers import rows_of_positions, static_parameters, taken_off
from qvdjax.ptq.reconstruction.known import Known, flat_weight


class ReconstructedLayer(StandIn, StaticRanges):
    """A Linear or Conv that is computed as its quantized form will be, as far as its weight is rounded by now.

    Attributes:
        layer: The layer, not trained.
        operands: Makes (transformed input, rounded weight) of (input, weight [out, in]), and says with `learned()` what
            was found: a `FlattenedWeight`, an `AdaptivelyRoundedWeight` or a `SteppedWeight`.
        input_scale, input_zero_point: [ranges, 1] of a static range of the input, not trained, or None.
        input_levels, input_edges: [count] and [count - 1] of the grid of a temporal feature, not trained, or None.
        shifted: [out, positions of the kernel], what a transform's shift takes off the product, of each timestep
            [timesteps, out, positions] where it has shifts, or None.
    """

    def __init__(
        self, layer: Linear | Conv, scheme: LayerScheme, operands: nnx.Module, known: Known,
        transform: InputTransform | None = None,
    ):  # fmt: skip
        """`transform` as it starts; `known` says what static ranges and levels are."""
        self.layer, self.scheme, self.role, self.axes = layer, scheme, layer.role, layer.axes
        self.operands, self.frame_axis = operands, layer.frame_axis
        static = (None, None)
        if scheme.activation is not None and not scheme.activation.dynamic:
            static = static_parameters(scheme, known.static_edges(scheme, transform))
        self.input_scale, self.input_zero_point = (
            None if a is None else nnx.Variable(a, axes=(None, None)) for a in static
        )
        levels = (None, None) if scheme.feature_grid is None else known.levels
        self.input_levels, self.input_edges = (
            None if a is None else nnx.Variable(jnp.asarray(a), axes=(None,)) for a in levels
        )
        shift = None if transform is None or transform.shift is None else transform.shift[...]
        shifted = None if shift is None else _taken_off(flat_weight(layer), shift, positions=self.positions)
        steps = () if scheme.shift_timesteps is None else (None,)
        self.shifted = None if shifted is None else nnx.Variable(shifted, axes=(*steps, layer.axes[0], None))

    @property
    def positions(self) -> int:
        """Of the kernel."""
        return math.prod(getattr(self.layer, "kernel", ()))

    def rounded(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in] -> the input that meets the weight, before and after its rounding."""
        x, _ = self.met(x)
        return x, self.round_input(x)

    def met(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., in] -> the transformed input, and the weight [out, in] as it is by now."""
        return self.operands(x, self.weight_to_round())

    def weight_to_round(self) -> jax.Array:
        """The weight [out, in] that the operands start from, at least float32."""
        weight = flat_weight(self.layer)
        return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))

    def round_input(self, x: jax.Array) -> jax.Array:
        """A transformed input [..., rows, in] as the product gets it."""
        return rounded_apart(self.scheme.centering, x, self.round_rest)

    def round_rest(self, x: jax.Array) -> jax.Array:
        """A transformed input [..., rows, in], or how it differs from its centre, rounded."""
        activation = self.scheme.activation
        if self.input_levels is not None:
            return to_levels(x, self.input_levels[...], self.input_edges[...])
        if activation is None:
            return x
        if self.input_scale is not None:
            return fake_quantize(x, activation.grid, *self.static_range(x.shape))
        # The range takes no gradient: that of a maximum looks for the place that equals it, and where XLA computes x
        # anew in the backward pass, to another last bit, there is none, and 0 / 0.
        return fake_quantize_dynamic(x, activation)

    def learned(self) -> dict[str, Any]:
        """What `qvdjax.ptq.layers.quantized_arrays` takes: what the operands say."""
        return self.operands.learned()


@jax.jit(static_argnames="positions")
def _taken_off(weight: jax.Array, shift: jax.Array, *, positions: int) -> jax.Array:
    rows = rows_of_positions(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), positions)
    return taken_off(rows, shift, positions)
