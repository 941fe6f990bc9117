"""Linear layers: float, and quantized with simulated or integer execution."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.kernels import quantized_linear, quantized_matmul
from qvdjax.nn.centering import rounded_apart
from qvdjax.nn.frames import FrameAxis
from qvdjax.nn.low_rank import LowRankBranch
from qvdjax.nn.quantized_layer import QuantizedLayer
from qvdjax.nn.scheme import LayerScheme, Role
from qvdjax.nn.token_estimator import EstimatorBranch
from qvdjax.nn.transforms import InputTransform
from qvdjax.nn.variables import Param, Scale
from qvdjax.numerics import QTensor, Quantizer, encode, fake_quantize, fake_quantize_dynamic, to_levels


class Linear(nnx.Module):
    """y = x W^T + b.

    Weights are [out, in], PyTorch's orientation: both operands of the product contract their last axis, which XLA
    needs on GPU for int8 and which does no harm on TPU.

    Attributes:
        weight: [out, in]. bias: [out], or None.
        role: What the layer does in its model; recipes match it.
        scheme: Why the layer is float, once a recipe has looked at it.
        frame_axis: Where the frames of a video lie in its input, None for nowhere.
    """

    def __init__(
        self, in_features: int, out_features: int, *, role: Role, axes: tuple, key: jax.Array, dtype=jnp.float32,
        bias: bool = True, keep_float32: bool = False, zero: bool = False, frame_axis: FrameAxis | None = None,
    ):  # fmt: skip
        """Fan-in initialisation. `axes` names the weight's two axes; `zero` starts at zero; `keep_float32` says
        that loading with a narrower dtype leaves the layer in float32."""
        initializer = jax.nn.initializers.lecun_normal(in_axis=1, out_axis=0)
        shape = (out_features, in_features)
        weight = jnp.zeros(shape, dtype) if zero else initializer(key, shape, dtype)
        self.weight = Param(weight, axes=axes, keep_float32=keep_float32)
        self.bias = Param(jnp.zeros((out_features,), dtype), axes=axes[:1], keep_float32=keep_float32) if bias else None
        self.role, self.axes, self.scheme, self.frame_axis = role, axes, LayerScheme(), frame_axis

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], in x's type."""
        y = jax.lax.dot_general(x, self.weight[...].astype(x.dtype), (((x.ndim - 1,), (1,)), ((), ())))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class QuantizedLinear(QuantizedLayer):
    """A Linear whose weight, input or both are quantized.

    Integer execution multiplies int8 codes into int32 and applies scales afterwards; simulated execution multiplies the
    dequantized floats. Where only one side is quantized there is no integer product to make: both multiply floats.

    Attributes, beside those of every quantized layer:
        weight: [out, in] where it stays float, else None.
        input_clip: [count, sides] float32 factors of the dynamic range (`qvdjax.nn.input_clip`), or None.
        transform: What the input passes through first, or None.
        shifted: [timesteps, out] float32, what a shift of timesteps takes off the product, or None. What one shift
            takes off is in the bias.
        low_rank: A branch in full precision, whose product of the transformed input is added, or None.
        estimator: What is added to the product for what rounding takes off it, made of the rounded input, or None.
        input_levels, input_edges: [count] and [count - 1] float32 of a grid of temporal features, or None.
        implementation: What computes integer products (`qvdjax.kernels.Implementation`), None for the device's best.
    """

    def __init__(
        self, *, weight: QTensor | jax.Array, axes: tuple, input_clip=None, transform: InputTransform | None = None,
        low_rank: LowRankBranch | None = None, estimator: EstimatorBranch | None = None, input_levels=None,
        input_edges=None, shifted=None, **shared,
    ):  # fmt: skip
        """`weight` as codes or as floats [out, in]; `shared` as `QuantizedLayer` takes it."""
        quantized = isinstance(weight, QTensor)
        super().__init__(weight=weight if quantized else None, axes=axes, **shared)
        self.weight = None if quantized else Param(weight, axes=axes)
        self.input_clip = None if input_clip is None else Scale(input_clip, axes=(None, None))
        self.transform, self.low_rank, self.estimator = transform, low_rank, estimator
        self.shifted = None if shifted is None else Scale(shifted, axes=(None, axes[0]))
        self.implementation = None
        self.input_levels, self.input_edges = (
            None if values is None else Scale(values, axes=(None,)) for values in (input_levels, input_edges)
        )

    def _clip(self, x):
        if self.input_clip is None:
            return None
        return self.clip_factors(self.input_clip[...], x)

    def _input_range(self, x):
        if self.input_scale is None:
            return self.scheme.activation.scale_of(x, self._clip(x))
        return self.static_range(x.shape)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in] -> [..., tokens, out], in x's type. A vector a sample may come as [batch, in]."""
        dtype, activation = x.dtype, self.scheme.activation
        if self.transform is not None:
            x = self.transform(x)
        if self.input_levels is not None:
            rounded = self._rounded(x)
            y = _contract(rounded, self._float_weight(rounded.dtype), jax.lax.Precision.HIGHEST)
        elif activation is None:
            rounded, y = x, _contract(x.astype(dtype), self._float_weight(dtype))
        elif self.codes is None or self.execution == "simulate":
            rounded = self._rounded(x)
            y = _contract(rounded, self._float_weight(rounded.dtype), jax.lax.Precision.HIGHEST)
        elif self._rounds_alone:
            bias = None if self.bias is None else self.bias[...]
            return quantized_linear(
                x, self.qweight, activation, bias=bias, dtype=dtype, implementation=self.implementation
            )
        else:
            rounded = self._encoded(x)
            products = [quantized_matmul(part, self.qweight, implementation=self.implementation) for part in rounded]
            y = sum(products[1:], products[0])  # [..., tokens, out], that of a centre [..., 1, out]
        if self.low_rank is not None:
            y = y + self.low_rank(x.astype(dtype)).astype(y.dtype)
        if self.estimator is not None:
            if isinstance(rounded, tuple):
                rounded = sum(part.dequantize() for part in rounded)
            y = y + self.estimator(rounded).astype(y.dtype)
        if self.shifted is not None:
            y = y + self.transform.rows_at_timestep(self.shifted[...], y.ndim, len(y)).astype(y.dtype)
        return y.astype(dtype) if self.bias is None else (y + self.bias[...].astype(y.dtype)).astype(dtype)

    @property
    def _rounds_alone(self) -> bool:
        """Whether rounding by the input's own range is all that happens before the product, and nothing is added."""
        ranges = (self.input_scale, self.input_clip, self.scheme.switch, self.scheme.centering)
        return all(part is None for part in (*ranges, self.low_rank, self.estimator, self.shifted))

    def rounded_input(self, x: jax.Array) -> jax.Array:
        """x [..., tokens, in] -> the floats that meet the weight: x behind the transform, rounded where it is."""
        x = x if self.transform is None else self.transform(x)
        return x if self.input_levels is None and self.scheme.activation is None else self._rounded(x)

    def _rounded(self, x: jax.Array) -> jax.Array:
        """The floats that the same integers stand for; gradients pass straight through the rounding."""
        activation = self.scheme.activation
        if self.input_levels is not None:
            return to_levels(x, self.input_levels[...], self.input_edges[...])
        if self.input_scale is not None:
            return fake_quantize(x, activation.grid, *self._input_range(x))
        return rounded_apart(self.scheme.centering, x, self._rounded_dynamically)

    def _rounded_dynamically(self, x: jax.Array) -> jax.Array:
        rounded = fake_quantize_dynamic(x, self.scheme.activation, self._clip(x))
        if self.scheme.switch is None:
            return rounded
        return jnp.where(self.fine(x.shape), fake_quantize_dynamic(x, self._finer, self._clip(x)), rounded)

    def _encoded(self, x: jax.Array) -> tuple[QTensor, ...]:
        """What x is the sum of as codes, bytes, with their ranges: x itself, or the rest and the centre."""
        if self.scheme.centering is None:
            return (self._codes_of(x),)
        center = self.scheme.centering.encoded(x)
        return self._codes_of(x - center.dequantize()), center

    def _codes_of(self, x: jax.Array) -> QTensor:
        rounded = encode(x, self.scheme.activation.grid, *self._input_range(x), jnp.int8)
        if self.scheme.switch is None:
            return rounded
        finer = encode(x, self._finer.grid, *self._finer.scale_of(x, self._clip(x)), jnp.int8)
        fine = self.fine(x.shape)
        return jax.tree.map(lambda a, b: jnp.where(fine, a, b), finer, dataclasses.replace(rounded, bits=finer.bits))

    @property
    def _finer(self) -> Quantizer:
        """The quantizer of the input at timesteps at which it has more bits."""
        return dataclasses.replace(self.scheme.activation, bits=self.scheme.switch.bits)

    def _float_weight(self, dtype) -> jax.Array:
        return (self.weight[...] if self.codes is None else self.qweight.dequantize()).astype(dtype)


def _contract(x: jax.Array, weight: jax.Array, precision=None) -> jax.Array:
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)
