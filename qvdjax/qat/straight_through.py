"""A float model that computes as if it were quantized, and can be trained: the straight-through estimator."""

from collections.abc import Mapping

import jax
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Attention, AttentionScheme, LayerScheme, Linear, VideoModel, swap_layers
from qvdjax.numerics import fake_quantize_dynamic


class FakeQuantizedLinear(nnx.Module):
    """A Linear whose weight and input are rounded to their grids on every call; gradients reach the float weight.

    The variables are the Linear's own, under the same names: what was trained is quantized afterwards as any float
    model is, and computes the same integers.
    """

    def __init__(self, linear: Linear, scheme: LayerScheme):
        self.weight, self.bias = linear.weight, linear.bias
        self.role, self.axes, self.scheme = linear.role, linear.axes, scheme

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], in x's type."""
        weight = self.weight[...]
        if self.scheme.weight is not None:
            weight = fake_quantize_dynamic(weight, self.scheme.weight)
        y = x if self.scheme.activation is None else fake_quantize_dynamic(x, self.scheme.activation)
        y = jax.lax.dot_general(y.astype(x.dtype), weight.astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def fake_quantized(model: VideoModel, schemes: Mapping[str, LayerScheme | AttentionScheme]) -> VideoModel:
    """The model with its linear layers as `schemes` (by name in diffusers) says, still float and trainable.

    Raises:
        UserError: A scheme whose range or transform comes from calibration, which this estimator has not.
    """

    def make(layer, scheme, names):
        if isinstance(layer, Attention):
            layer.scheme = scheme
            return layer
        if not scheme.quantizes:
            return layer
        check_trainable(layer, scheme, names[0])
        return FakeQuantizedLinear(layer, scheme)

    return swap_layers(model, schemes, make)


def check_trainable(layer: nnx.Module, scheme: LayerScheme, name: str) -> None:
    """Raise UserError for what no trained layer takes the place of."""
    static = scheme.activation is not None and not scheme.activation.dynamic
    if static or scheme.transforms or scheme.low_rank or not isinstance(layer, Linear):
        raise UserError(
            f"{name}: its recipe transforms inputs or needs calibration, or it is no linear layer; none is trained yet",
            remedy="train with a dynamic recipe such as rtn-w4a4, and leave convolutions float",
        )
