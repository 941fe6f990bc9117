"""Codes of symmetric ranges inside a TPU kernel: whole numbers or float8."""

import jax
import jax.numpy as jnp

from qvdjax.numerics.float8 import LARGEST


def largest_code(bits: int, dtype) -> float:
    """What the largest magnitude of a range becomes, in codes held as int8 or float8."""
    return 2 ** (bits - 1) - 1 if dtype == jnp.int8 else LARGEST


def codes_of(real: jax.Array, bits: int, dtype) -> jax.Array:
    """The nearest codes, int8 or float8, of numbers in units of their scale."""
    high = largest_code(bits, dtype)
    if dtype == jnp.int8:
        return jnp.clip(jnp.round(real), -high - 1, high).astype(jnp.int32).astype(dtype)
    return jnp.clip(real, -high, high).astype(dtype)
