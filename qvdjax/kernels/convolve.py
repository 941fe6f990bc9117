"""Convolutions of channels-last arrays with weights in PyTorch's orientation."""

import functools
import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import DTypeLike

Padding = tuple[tuple[int, int], ...]


def convolve(
    x: jax.Array, weight: jax.Array, stride: tuple[int, ...], padding: Padding, *,
    precision: jax.lax.Precision | None = None, into: DTypeLike | None = None,
) -> jax.Array:  # fmt: skip
    """x [batch, *space, in] with weight [out, in, *kernel] -> [batch, *space', out], over one to three axes.

    Args:
        x, weight: Floats, or integers.
        stride, padding: One entry an axis.
        precision: Of products of floats, for devices that have several.
        into: Type of the sums, for integers.
    """
    if mixes_first_axis_alone(weight.shape[2:], stride, padding):
        # Along the other two nothing is mixed, so they are one: convolutions over two axes are fast everywhere.
        flat, weight = rearrange(x, "b f h w c -> b f (h w) c"), rearrange(weight, "o i k h 1 -> o i k h")
        y = convolve(flat, weight, stride[:2], padding[:2], precision=precision, into=into)
        return rearrange(y, "b f (h w) c -> b f h w c", h=x.shape[2])
    if into is None and jax.default_backend() == "cpu":  # which has one precision
        return _with_fast_gradients(x, weight, stride, padding)
    return _convolve(x, weight, stride, padding, precision=precision, preferred_element_type=into)


def mixes_first_axis_alone(kernel: tuple[int, ...], stride: tuple[int, ...], padding: Padding) -> bool:
    """Whether a convolution over three axes, such as one over frames, is one over the first."""
    still = all(k == 1 and s == 1 and not any(p) for k, s, p in list(zip(kernel, stride, padding, strict=True))[1:])
    return len(kernel) == 3 and still


def _convolve(x, weight, stride, padding, **options) -> jax.Array:
    space = "DHW"[3 - len(stride) :]
    # In a loop (a sampler's steps) XLA on CPU knows one layout of weights alone, with channels last; others are some
    # forty times slower there (jax-ml/jax#12868). Elsewhere the compiler lays weights out as it likes.
    weight = jnp.moveaxis(weight, (0, 1), (-1, -2))  # out in *kernel -> *kernel in out
    layout = (f"N{space}C", f"{space}IO", f"N{space}C")
    return jax.lax.conv_general_dilated(x, weight, stride, padding, dimension_numbers=layout, **options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _with_fast_gradients(x, weight, stride, padding):
    """A convolution whose gradients in a loop (a training run's steps) are as fast on CPU as outside.

    jax writes both gradients as convolutions whose batch and channels have changed places, which XLA on CPU computes
    thirty times more slowly in a loop. Here the gradient of x is a convolution like any other, that of the weight one
    product over all positions for each place of the kernel.
    """
    return _convolve(x, weight, stride, padding)


def _forward(x, weight, stride, padding):
    return _convolve(x, weight, stride, padding), (x, weight)


def _backward(stride, padding, kept, gradient):
    x, weight = kept
    kernel = weight.shape[2:]
    return (
        _input_gradient(gradient, weight, x.shape[1:-1], kernel, stride, padding).astype(x.dtype),
        _weight_gradient(gradient, x, kernel, stride, padding).astype(weight.dtype),
    )


_with_fast_gradients.defvjp(_forward, _backward)


def _input_gradient(gradient, weight, space, kernel, stride, padding) -> jax.Array:
    """gradient [batch, *space', out] -> [batch, *space, in]: zeros between strides, and the kernel turned round."""
    apart = []
    for size, out, k, s, (before, _) in zip(space, gradient.shape[1:-1], kernel, stride, padding, strict=True):
        low = k - 1 - before
        # So much that the result is as long as the input was.
        apart.append((low, size + k - 1 - low - ((out - 1) * s + 1), s - 1))
    zero = jnp.zeros((), gradient.dtype)
    spread = jax.lax.pad(gradient, zero, [(0, 0, 0), *apart, (0, 0, 0)])
    turned = jnp.flip(weight, range(2, weight.ndim)).swapaxes(0, 1)  # out in *kernel -> in out *kernel
    return _convolve(spread, turned, (1,) * len(kernel), ((0, 0),) * len(kernel))


def _weight_gradient(gradient, x, kernel, stride, padding) -> jax.Array:
    """gradient [batch, *space', out] and x [batch, *space, in] -> [out, in, *kernel]."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    positions = tuple(range(gradient.ndim - 1))
    products = []
    for place in itertools.product(*map(range, kernel)):
        ends = [p + (out - 1) * s + 1 for p, out, s in zip(place, gradient.shape[1:-1], stride, strict=True)]
        seen = jax.lax.slice(x, (0, *place, 0), (x.shape[0], *ends, x.shape[-1]), (1, *stride, 1))
        products.append(jax.lax.dot_general(gradient, seen, ((positions, positions), ((), ()))))  # [out, in]
    return jnp.stack(products, axis=-1).reshape(*products[0].shape, *kernel)  # out in (*kernel) -> out in *kernel
