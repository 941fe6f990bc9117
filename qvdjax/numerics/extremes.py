"""The smallest and the largest of many values, with gradients that stay finite.

The usual gradient of a maximum is shared out among the entries that equal it, and divided by how many these are. Where
a compiler computes the entries anew in the backward pass, to another last bit, none may equal it: 0 / 0. Here it goes
to the place of the extreme among the entries as they are then, the first of several.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def smallest(x: jax.Array, axis: int) -> jax.Array:
    """x [..., n, ...] -> [..., ...], the smallest value along an axis."""
    return x.min(axis=axis)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def largest(x: jax.Array, axis: int) -> jax.Array:
    """x [..., n, ...] -> [..., ...], the largest value along an axis."""
    return x.max(axis=axis)


@smallest.defjvp
def _smallest_jvp(axis, primals, tangents):
    return smallest(primals[0], axis), _at(tangents[0], primals[0].argmin(axis=axis, keepdims=True), axis)


@largest.defjvp
def _largest_jvp(axis, primals, tangents):
    return largest(primals[0], axis), _at(tangents[0], primals[0].argmax(axis=axis, keepdims=True), axis)


def _at(x: jax.Array, place: jax.Array, axis: int) -> jax.Array:
    """x [..., n, ...] at places [..., 1, ...] along an axis -> [..., ...]. A sum over a mask: transposed, it writes no
    scattered entries."""
    here = jax.lax.broadcasted_iota(place.dtype, x.shape, axis % x.ndim) == place
    return jnp.where(here, x, 0).sum(axis=axis)
