"""Hadamard matrices, and the product of an array's last axis with one: matrices of +1 and -1 with orthogonal rows.

Orders built here are 2**k (Sylvester) and m 2**k where m - 1 <= 255 is a prime that leaves 3 when divided by four
(Paley's first construction). With m of 12, 20, 60, 108 and 140 they are all of the widths of published video
transformers: 1536 = 12 * 128, 5120 = 20 * 256, 1920 = 60 * 32, 13824 = 108 * 128, 8960 = 140 * 64.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

_LARGEST_PALEY = 256
_LARGEST_LAST = 128  # as wide as the matrix units of TPUs


def factors(order: int) -> tuple[int, int] | None:
    """The orders of the two matrices whose Kronecker product is the Hadamard matrix of an order; None where none
    is built here. The second is a power of two, at most 128."""
    odd = order // (order & -order)
    base = 1 if odd == 1 else next((m for m in _doubled(4 * odd) if _is_prime(m - 1)), None)
    if base is None or order % base:
        return None
    last = min(order // base, _LARGEST_LAST)
    return order // last, last


def _doubled(first: int) -> list[int]:
    return [first << k for k in range(8) if first << k <= _LARGEST_PALEY]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def largest_order(width: int, most: int | None = None) -> int:
    """The largest divisor of a width, at most `most`, of which a Hadamard matrix is built here; 1 for odd widths."""
    most = width if most is None else min(most, width)
    return next(order for order in range(most, 0, -1) if width % order == 0 and factors(order))


@functools.cache
def matrix(order: int) -> np.ndarray:
    """The Hadamard matrix [order, order], int8 of +1 and -1.

    Raises:
        ValueError: None of this order is built here.
    """
    if factors(order) is None:
        raise ValueError(f"no Hadamard matrix of order {order} is built here")
    if order == 1:
        return np.ones((1, 1), np.int8)
    half = factors(order // 2) if order % 2 == 0 else None
    if half is not None:
        return np.kron(np.array([[1, 1], [1, -1]], np.int8), matrix(order // 2))
    return _paley(order)


def _paley(order: int) -> np.ndarray:
    """I + S with S of the quadratic residues modulo the prime order - 1; skew, since that prime is 3 modulo 4."""
    prime = order - 1
    character = np.full(prime, -1, np.int8)
    character[[i * i % prime for i in range(1, prime)]] = 1
    character[0] = 0
    numbers = np.arange(prime)
    skew = np.zeros((order, order), np.int8)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = character[(numbers[:, None] - numbers[None, :]) % prime]
    return np.eye(order, dtype=np.int8) + skew


def rotate(x: jax.Array, order: int, *, inverse: bool = False) -> jax.Array:
    """Each block of `order` neighbours of the last axis times the orthonormal Hadamard matrix.

    Two products with small matrices (see `factors`) rather than log2(order) passes of sums and differences: matrix
    units make the first quickly, and the second shuffle neighbours around, which TPUs do slowly. Products are exact
    where x is bfloat16; of float32 they are made in full precision.

    Args:
        x: [..., width], of which `order` is a divisor.
        order: Of the matrix H; y = x H^T / sqrt(order) in each block.
        inverse: x H / sqrt(order) instead, which undoes it.

    Returns:
        [..., width], at least float32.
    """
    first, last = factors(order)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    precision = None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    y = rearrange(x, "... (blocks first last) -> ... blocks first last", first=first, last=last)
    multiply = functools.partial(jnp.einsum, precision=precision, preferred_element_type=wide)
    for size, pattern in ((last, "...l,kl->...k"), (first, "...fl,gf->...gl")):
        if size > 1:
            h = matrix(size).T if inverse else matrix(size)
            y = multiply(pattern, y, jnp.asarray(h, y.dtype))
    y = y.astype(wide) / math.sqrt(order)
    return rearrange(y, "... blocks first last -> ... (blocks first last)")


def multiply_adds(width: int, order: int) -> int:
    """Of one rotated vector of this width."""
    return width * sum(size for size in factors(order) if size > 1)
