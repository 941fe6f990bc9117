"""A convolution during reconstruction."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qvdjax.kernels.convolve import convolve
from qvdjax.nn.conv import given_back
from qvdjax.numerics import fake_quantize, fake_quantize_dynamic
from qvdjax.ptq.reconstruction.reconstructed_layer import ReconstructedLayer


class ReconstructedConv(ReconstructedLayer):
    """A Conv during reconstruction: as `qvdjax.nn.QuantizedConv`, with a weight whose rounding is trained."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, *space, in] -> [batch, *space', out], in x's type."""
        dtype = x.dtype
        x, weight = self.met(x)
        x = self.round_input(x)
        y = self._convolved(x.astype(dtype), weight.astype(dtype))
        if self.shifted is not None:
            y = y + given_back(self.shifted[...].astype(dtype), x, self.operands.transform, self._convolved)
        return y if self.bias is None else y + self.bias[...].astype(dtype)

    def _convolved(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """x [batch, *space, channels] with weight [out, (channels positions)]."""
        kernel = weight.reshape(len(weight), -1, *self.layer.kernel)  # out (c p) -> out c *kernel
        return convolve(x, kernel, self.layer.stride, self.layer.padding)

    def round_input(self, x: jax.Array) -> jax.Array:
        """A transformed input [batch, *space, in] as the product gets it; each part by its own ranges."""
        activation, split = self.scheme.activation, self.scheme.split
        if activation is None:
            return x
        ends = (x.shape[-1],) if split is None else np.cumsum(split)
        starts = (0, *ends[:-1])
        parts = [
            self._round(x[..., start:end], slice(None) if split is None else slice(number, number + 1))
            for number, (start, end) in enumerate(zip(starts, ends, strict=True))
        ]
        return jnp.concatenate(parts, axis=-1)

    def _round(self, x: jax.Array, part: slice) -> jax.Array:
        """One part of the input, of the static ranges `part`."""
        rows, activation = rearrange(x, "b ... c -> b (...) c"), self.scheme.activation
        if self.input_scale is None:
            return fake_quantize_dynamic(rows, activation).reshape(x.shape)
        # one range in all: [1, 1] -> [1, 1, 1]; those of samples are [batch, 1, 1] already
        pair = (None if a is None else a[part].reshape(-1, 1, 1) for a in self.static_range(rows.shape))
        return fake_quantize(rows, activation.grid, *pair).reshape(x.shape)
