"""Convolutions on channels-last arrays with PyTorch's weight orientation: float, and quantized."""

import functools
import math
import operator
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from qvdjax.kernels import quantized_convolution
from qvdjax.kernels.convolve import Padding, convolve
from qvdjax.nn.quantized_layer import QuantizedLayer
from qvdjax.nn.scheme import LayerScheme, Role
from qvdjax.nn.transforms import InputTransform
from qvdjax.nn.variables import Param, Scale
from qvdjax.numerics import QTensor, encode, fake_quantize


class Conv(nnx.Module):
    """Convolution over one, two or three axes.

    Padding is always explicit: JAX's "SAME" pads an even input of a strided convolution on one side only, PyTorch
    on both.

    Attributes:
        weight: [out, in, *kernel]. bias: [out], or None.
        stride, padding: One entry a spatial axis.
        frame_axis: 0 where samples of its input are frames of a video, else None.
        parts: Channels of each array that its input is made of, where several are put one behind the other, else None.
    """

    def __init__(
        self, in_features: int, out_features: int, kernel: tuple[int, ...], *, role: Role, axes: tuple, key: jax.Array,
        stride: tuple[int, ...] | None = None, padding: Padding | None = None, dtype=jnp.float32, bias: bool = True,
        frame_axis: Literal[0] | None = None, parts: tuple[int, ...] | None = None,
    ):  # fmt: skip
        shape = (out_features, in_features, *kernel)
        bound = math.sqrt(1 / (in_features * math.prod(kernel)))
        self.weight = Param(bound * jax.random.normal(key, shape, dtype), axes=(*axes, *[None] * len(kernel)))
        self.bias = Param(jnp.zeros((out_features,), dtype), axes=axes[:1]) if bias else None
        self.stride, self.padding = stride or (1,) * len(kernel), padding or ((0, 0),) * len(kernel)
        self.kernel, self.role, self.axes, self.scheme = kernel, role, axes, LayerScheme()
        self.frame_axis, self.parts = frame_axis, parts

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, *space, in] -> [batch, *space', out], in x's type."""
        weight = self.weight[...].astype(x.dtype)
        if self.stride == self.kernel and not any(map(any, self.padding)):
            y = _patches_times(x, weight, self.kernel)
        else:
            y = convolve(x, weight, self.stride, self.padding)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


def _patches_times(x, weight, kernel):
    """A convolution whose stride is its kernel is one product over patches."""
    space = len(kernel)
    grid = [size // k for size, k in zip(x.shape[1:-1], kernel, strict=True)]
    split = [n for pair in zip(grid, kernel, strict=True) for n in pair]
    x = x.reshape(x.shape[0], *split, x.shape[-1])  # batch (g0 k0 g1 k1 ...) in
    order = (0, *range(1, 2 * space, 2), 2 * space + 1, *range(2, 2 * space + 1, 2))
    patches = x.transpose(order).reshape(x.shape[0], *grid, -1)  # batch g0 g1 ... (in k0 k1 ...)
    flat = rearrange(weight, "out ... -> out (...)")
    return jax.lax.dot_general(patches, flat, (((patches.ndim - 1,), (1,)), ((), ())))


def given_back(
    shifted: jax.Array, x: jax.Array, transform: InputTransform, convolved: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """What a shift takes off a convolution, at every place of its output.

    Args:
        shifted: [out, positions of the kernel], or [timesteps, out, positions] with a transform of these.
        x: The input [batch, *space, in], of which the shape counts.
        transform: The layer's.
        convolved: The layer's convolution, of one channel [batch, *space, 1] with a weight [out, positions].

    Returns:
        [1 or batch, *space', out], less where the kernel lies over a zero-padded border.
    """
    # Where the kernel lies inside the input: the same in all samples.
    inside = jnp.ones((1, *x.shape[1:-1], 1), shifted.dtype)
    if transform.timesteps is None:
        return convolved(inside, shifted)
    overlap = convolved(inside, jnp.eye(shifted.shape[-1], dtype=shifted.dtype))[0]  # [*space', positions]
    own = transform.rows_at_timestep(shifted, shifted.ndim, len(x))  # [batch, out, positions]
    return jnp.einsum("...p,bop->b...o", overlap, own, precision=jax.lax.Precision.HIGHEST)


class QuantizedConv(QuantizedLayer):
    """A Conv with a quantized weight (one range an output channel or the tensor) and one range an input sample.

    Where the input is made of parts, these may have ranges of their own, of input and weight (`LayerScheme.split`).

    A product here sums over positions too, so activations can have no finer range than "tensor" (dynamic: one a
    sample; static: one in all, or one for each frame where samples are frames, or for each timestep). Integer execution
    is what `qvdjax.kernels.quantized_convolution_choice` says: where a device has no convolution of int8, or a slow
    one, the same integers are multiplied as floats.

    Attributes, beside those of every quantized layer (`in` is in * kernel here):
        kernel, stride, padding: One entry a spatial axis.
        transform: A shift or a scale of the input's channels, or None.
        implementation: What computes integer execution (`qvdjax.kernels.Implementation`), None for the best.
        shifted: [out, positions of the kernel] float32, what a shift takes off the product at each position, of each
            timestep [timesteps, out, positions] where it has shifts, or None. Positions over a zero-padded border lose
            nothing, so it cannot be part of the bias.
    """

    def __init__(
        self, *, weight: QTensor, kernel: tuple[int, ...], stride: tuple[int, ...], padding: Padding,
        transform: InputTransform | None = None, shifted=None, **shared,
    ):  # fmt: skip
        """`shared` as `QuantizedLayer` takes it."""
        super().__init__(weight=weight, **shared)
        self.kernel, self.stride, self.padding, self.transform = kernel, stride, padding, transform
        self.implementation = None
        steps = () if self.scheme.shift_timesteps is None else (None,)
        self.shifted = None if shifted is None else Scale(shifted, axes=(*steps, self.axes[0], None))

    def _unflatten(self, rows):
        """[out, in * kernel] -> [out, in, *kernel]."""
        return rows.reshape(rows.shape[0], -1, *self.kernel)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, *space, in] -> [batch, *space', out], in x's type."""
        dtype, activation = x.dtype, self.scheme.activation
        if self.transform is not None:
            x = self.transform(x)
        if activation is None:
            x = x.astype(dtype)
            y = convolve(x, self._unflatten(self.qweight.dequantize()).astype(dtype), self.stride, self.padding)
        else:
            integer = functools.partial(self._integer, dtype=dtype)
            multiply = integer if self.execution == "integer" else self._simulated
            # One product a part of the input; without parts, one.
            y = functools.reduce(operator.add, (multiply(*part) for part in self._operands(x)))
        if self.shifted is not None:
            y = y + given_back(self.shifted[...].astype(y.dtype), x, self.transform, self._of_one_channel)
        return y.astype(dtype) if self.bias is None else (y + self.bias[...].astype(y.dtype)).astype(dtype)

    def _of_one_channel(self, x, weight):
        """x [batch, *space, 1] with weight [out, positions]."""
        return convolve(x, self._unflatten(weight), self.stride, self.padding)

    @property
    def qweight(self) -> QTensor:
        """The weight as a QTensor [out, in]; where parts have ranges of their own, each column has its part's."""
        whole, split = super().qweight, self.scheme.split
        if split is None:
            return whole
        columns = np.repeat(np.arange(len(split)), np.array(split) * math.prod(self.kernel))
        scale, zero_point = (None if a is None else a[..., columns] for a in (whole.scale, whole.zero_point))
        return QTensor(whole.codes, scale, zero_point, whole.bits)

    def _operands(self, x):
        """(input, rows of it, its scale and zero point, weight) of every part of the channels of x."""
        split = self.scheme.split
        if split is None:
            rows = rearrange(x, "b ... c -> b (...) c")
            yield x, rows, *self._input_range(rows, slice(None)), super().qweight
            return
        start, positions, whole = 0, math.prod(self.kernel), super().qweight
        for number, channels in enumerate(split):
            own, part = slice(number, number + 1), x[..., start : start + channels]
            columns = slice(start * positions, (start + channels) * positions)  # (c p) of the part
            zero_point = None if whole.zero_point is None else whole.zero_point[..., own]
            weight = QTensor(whole.codes[..., columns], whole.scale[..., own], zero_point, whole.bits)
            rows = rearrange(part, "b ... c -> b (...) c")
            yield part, rows, *self._input_range(rows, own), weight
            start += channels

    def _input_range(self, rows, part: slice):
        """Scale and zero point, each [batch or 1, 1, 1]."""
        if self.input_scale is None:
            return self.scheme.activation.scale_of(rows)
        # one range in all: [1, 1] -> [1, 1, 1]; each frame's is [batch, 1, 1] already
        return tuple(None if a is None else a[part].reshape(-1, 1, 1) for a in self.static_range(rows.shape))

    def _simulated(self, x, rows, scale, zero_point, weight):
        x = fake_quantize(rows, self.scheme.activation.grid, scale, zero_point).reshape(x.shape)
        weight = self._unflatten(weight.dequantize())
        return convolve(x, weight, self.stride, self.padding, precision=jax.lax.Precision.HIGHEST)

    def _integer(self, x, rows, scale, zero_point, weight, *, dtype):
        spread = lambda a: a.reshape(-1, *[1] * (x.ndim - 1))  # noqa: E731  [batch or 1, 1, 1] -> [batch or 1, 1, ...]
        codes = encode(rows, self.scheme.activation.grid, scale, zero_point, jnp.int8)
        codes = QTensor(
            codes.codes.reshape(x.shape), spread(scale), None if zero_point is None else spread(zero_point),
            codes.bits, codes.codebook,
        )  # fmt: skip
        return quantized_convolution(
            codes, weight, kernel=self.kernel, stride=self.stride, padding=self.padding, dtype=dtype,
            implementation=self.implementation,
        )  # fmt: skip
