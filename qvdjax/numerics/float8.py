"""Codes that are floating-point numbers of eight bits, held as these bits in a signed byte.

float8_e4m3fn (Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433): four bits of exponent, three of
mantissa, no infinity, 448 the largest. Every number is exact in bfloat16, and every product of two in float32.
"""

from typing import Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

FLOAT8: Final = "float8_e4m3fn"
LARGEST: Final = 448.0


def encode_float8(x: jax.Array) -> jax.Array:
    """Bits int8 of the nearest number, half to even; what lies beyond the largest becomes it, NaN stays one."""
    near = jnp.clip(x.astype(jnp.float32), -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    return jax.lax.bitcast_convert_type(near, jnp.int8)


def decode_float8(codes: jax.Array) -> jax.Array:
    """The float8 whose bits the codes, whole numbers of any type, are."""
    return jax.lax.bitcast_convert_type(codes.astype(jnp.int8), jnp.float8_e4m3fn)


def as_float8(codes: np.ndarray) -> np.ndarray:
    """The same of an int8 array on the host, which it shares the memory of."""
    return codes.view(ml_dtypes.float8_e4m3fn)
