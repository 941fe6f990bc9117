"""A linear layer during reconstruction."""

from typing import Any

import jax
from flax import nnx

from qvdjax.nn import InputTransform, LayerScheme, Linear, LowRankBranch
from qvdjax.numerics import fake_quantize
from qvdjax.ptq.layers import transformed_weight
from qvdjax.ptq.low_rank import along, output_directions, product
from qvdjax.ptq.reconstruction.flattened_weight import LearnedClip
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.reconstructed_layer import ReconstructedLayer


class ReconstructedLinear(ReconstructedLayer):
    """A Linear during reconstruction.

    Attributes, beside those of every reconstructed layer:
        estimator: What is added to the product for what rounding takes off it (a `LearnedEstimator`), or None.
        low_rank: A branch in full precision, not trained, of which the transform has no part: what the operands get is
            the rest of the weight. None without one.
        input_clip: [1, sides] logits of the input's dynamic range, or None.
    """

    def __init__(
        self, layer: Linear, scheme: LayerScheme, operands: nnx.Module, known: Known,
        transform: InputTransform | None = None, estimator: nnx.Module | None = None,
    ):  # fmt: skip
        super().__init__(layer, scheme, operands, known, transform)
        self.estimator = estimator
        self.low_rank = None if scheme.low_rank is None else _branch(layer, scheme, transform)
        sides = 1 if scheme.activation is None or scheme.activation.symmetric else 2
        self.input_clip = None if scheme.input_clip is None else LearnedClip.started((1, sides))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in] -> [..., tokens, out], in x's type."""
        dtype, whole = x.dtype, x
        x, weight = self.met(x)
        x = self.round_input(x)
        # The stream's type, as the product of integers is written in it; ranges and rounding are float32.
        y = jax.lax.dot_general(x.astype(dtype), weight.astype(dtype), (((x.ndim - 1,), (1,)), ((), ())))
        if self.low_rank is not None:
            y = y + self.low_rank(whole)
        if self.estimator is not None:
            y = (y + self.estimator(x)).astype(dtype)
        if self.shifted is not None:
            shifted = self.shifted[...][..., 0].astype(dtype)  # one position: [[timesteps,] out]
            if self.scheme.shift_timesteps is not None:
                shifted = self.operands.transform.rows_at_timestep(shifted, y.ndim, len(y))
            y = y + shifted
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def weight_to_round(self) -> jax.Array:
        """The weight [out, in], or what a branch leaves of it, at least float32."""
        weight = super().weight_to_round()
        if self.low_rank is None:
            return weight
        up, down = (factor[...].astype(weight.dtype) for factor in (self.low_rank.up, self.low_rank.down))
        return weight - product(up, down)

    def round_rest(self, x: jax.Array) -> jax.Array:
        """A transformed input [..., tokens, in], or how it differs from its centre, rounded."""
        if self.input_clip is None:
            return super().round_rest(x)
        # The range takes part in the gradient, as in FlatQuant's code.
        quantizer = self.scheme.activation
        return fake_quantize(x, quantizer.grid, *quantizer.scale_of(x, self._input_factors()))

    def _input_factors(self):
        factors = self.input_clip.factors()  # [1, sides]
        return factors[:, :1], factors[:, -1:]

    def learned(self) -> dict[str, Any]:
        """What `qvdjax.ptq.layers.quantized_arrays` takes: `input_clip`, `estimator`, `low_rank_up`, and what the
        operands say."""
        found = super().learned()
        if self.low_rank is not None:
            found["low_rank_up"] = self.low_rank.up[...]
        if self.estimator is not None:
            found["estimator"] = self.estimator.learned()
        return found if self.input_clip is None else {**found, "input_clip": self.input_clip.factors()}


@jax.jit(static_argnames="rank")
def _branch_factors(weight: jax.Array, transform: InputTransform | None, *, rank: int) -> tuple[jax.Array, jax.Array]:
    """down [rank, in], of the input as it comes, and up [out, rank]: the directions of the transformed weight."""
    up = output_directions(transformed_weight(weight, transform), rank)
    down = along(transformed_weight(weight, None), up)
    return down.astype(weight.dtype), up.astype(weight.dtype)


def _branch(layer: Linear, scheme: LayerScheme, transform: InputTransform | None) -> LowRankBranch:
    rank = scheme.low_rank.rank_of(layer.weight.shape)
    return LowRankBranch(*_branch_factors(layer.weight[...], transform, rank=rank), axes=layer.axes)
