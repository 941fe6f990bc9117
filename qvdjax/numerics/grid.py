"""Integer grids: which codes a b-bit number may take, and the range that maps floats onto them."""

import dataclasses

import jax
import jax.numpy as jnp

BITS = range(2, 9)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A uniform grid of 2**bits codes, held in a signed byte.

    Symmetric: codes in [-2**(bits-1), 2**(bits-1) - 1], real = code * scale, scale = max|x| / (2**(bits-1) - 1)
    (S2Q-VDiT section 2, the base quantizer; the lowest code is used only by values that clip).
    Asymmetric: the textbook codes 0 .. 2**bits - 1 are held minus 2**(bits-1), so that eight bits fit int8;
    real = (code - zero_point) * scale, with the zero point shifted likewise and float32 (it may be fractional).
    """

    bits: int
    symmetric: bool = True

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    def from_range(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point that cover the real range [low, high] (any equal shapes).

        The range always includes zero, so that zero is representable. A range of width zero gets scale 1,
        which maps it to the code of zero. Returns at least float32 arrays; the zero point is None when symmetric.
        """
        dtype = jnp.promote_types(jnp.result_type(low, high), jnp.float32)
        low, high = jnp.minimum(low, 0).astype(dtype), jnp.maximum(high, 0).astype(dtype)
        if self.symmetric:
            scale = jnp.maximum(-low, high) / self.high
            return jnp.where(scale > 0, scale, 1).astype(dtype), None
        scale = (high - low) / (2**self.bits - 1)
        scale = jnp.where(scale > 0, scale, 1).astype(dtype)
        # Rounded so that real zero falls exactly on a code; learned zero points need not be integers.
        return scale, jnp.clip(jnp.round(self.low - low / scale), self.low, self.high)

    def encode(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Codes of x as floats (rounded half to even, clipped), so that callers choose the integer type."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        codes = x.astype(dtype) / scale
        if zero_point is not None:
            codes = codes + zero_point
        return jnp.clip(jnp.round(codes), self.low, self.high)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Real values of codes, in the type of the scale (at least float32)."""
        real = codes.astype(jnp.promote_types(scale.dtype, jnp.float32))
        return (real if zero_point is None else real - zero_point) * scale
