"""Integer grids: which codes a b-bit number may take, and the range that maps floats onto them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.numerics.codebook import levels
from qvdjax.numerics.float8 import FLOAT8, LARGEST, decode_float8, encode_float8

BITS = range(2, 9)


@dataclasses.dataclass(frozen=True)
class Grid:
    """A uniform grid of 2**bits codes, held in a signed byte.

    Symmetric: codes in [-2**(bits-1), 2**(bits-1) - 1], real = code * scale, scale = max|x| / (2**(bits-1) - 1)
    (S2Q-VDiT section 2, the base quantizer; the lowest code is used only by values that clip).
    Asymmetric: the textbook codes 0 .. 2**bits - 1 are held minus 2**(bits-1), so that eight bits fit int8;
    real = (code - zero_point) * scale, with the zero point shifted likewise and float32 (it may be fractional).
    With a codebook (`qvdjax.numerics.codebook`), which is symmetric, code c stands for the level number
    c + 2**(bits-1), a whole number of -127 to 127: real = level * scale. With the codebook "float8_e4m3fn" it is the
    bits of a float8 (`qvdjax.numerics.float8`): real = float8 * scale, scale = max|x| / 448.
    """

    bits: int
    symmetric: bool = True
    codebook: str | None = None

    def __post_init__(self):
        if self.bits not in BITS:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.codebook is not None:
            if not self.floating:
                levels(self.codebook, self.bits)
            elif self.bits != 8:
                raise ValueError(f"{FLOAT8} has 8 bits, not {self.bits}")
            if not self.symmetric:
                raise ValueError("a codebook has no zero point")

    @property
    def floating(self) -> bool:
        """Whether codes are floating-point numbers."""
        return self.codebook == FLOAT8

    @property
    def by_deviation(self) -> bool:
        """Whether the scale follows from a standard deviation, not from the largest value."""
        return self.codebook is not None and not self.floating

    @property
    def largest(self) -> float:
        """What the largest magnitude of a symmetric range becomes, in units of the scale."""
        return LARGEST if self.floating else self.high

    @property
    def low(self) -> int:
        """Smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def levels(self) -> np.ndarray:
        """What the codes of a codebook stand for, ascending, int8 [2**bits]."""
        return np.array(levels(self.codebook, self.bits)[0], np.int8)

    @property
    def outermost(self) -> tuple[float, float]:
        """The least and the largest level of a codebook."""
        return (-LARGEST, LARGEST) if self.floating else (float(self.levels[0]), float(self.levels[-1]))

    def operands(self, codes: jax.Array) -> jax.Array:
        """Codes as what products multiply: int8, themselves or the levels that they stand for; or float8."""
        if self.floating:
            return decode_float8(codes)
        if self.codebook is None:
            return codes.astype(jnp.int8)
        return jnp.asarray(self.levels)[codes.astype(jnp.int32) - self.low]

    def from_deviation(self, deviation: jax.Array) -> jax.Array:
        """Scale of a codebook for values of some standard deviation about zero.

        No level is zero, so values that are all zero get a scale next to it.
        """
        scale = deviation * levels(self.codebook, self.bits)[1]
        return jnp.maximum(scale.astype(jnp.promote_types(scale.dtype, jnp.float32)), 1e-30)

    def from_range(self, low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Scale and zero point that cover the real range [low, high] (any equal shapes).

        The range always includes zero, so that zero is representable. A range of width zero gets scale 1,
        which maps it to the code of zero. Returns at least float32 arrays; the zero point is None when symmetric.
        """
        if self.by_deviation:
            raise ValueError("a codebook is scaled by a standard deviation, not by a range")
        dtype = jnp.promote_types(jnp.result_type(low, high), jnp.float32)
        low, high = jnp.minimum(low, 0).astype(dtype), jnp.maximum(high, 0).astype(dtype)
        if self.symmetric:
            scale = jnp.maximum(-low, high) / self.largest
            return jnp.where(scale > 0, scale, 1).astype(dtype), None
        scale = (high - low) / (2**self.bits - 1)
        scale = jnp.where(scale > 0, scale, 1).astype(dtype)
        # Rounded so that real zero falls exactly on a code; learned zero points need not be integers.
        return scale, jnp.clip(jnp.round(self.low - low / scale), self.low, self.high)

    def from_largest(self, largest: jax.Array) -> jax.Array:
        """Scale of a symmetric grid from the largest magnitude (any shape); 1 for zero, NaN for an infinity or NaN."""
        scale = largest.astype(jnp.promote_types(largest.dtype, jnp.float32)) / self.largest
        return jnp.where(jnp.isinf(scale), jnp.nan, jnp.where(scale > 0, scale, jnp.where(scale == 0, 1, jnp.nan)))

    def encode(self, x: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Codes of x as floats (rounded half to even, clipped), so that callers choose the integer type."""
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        codes = x.astype(dtype) / scale
        if self.floating:
            return encode_float8(codes).astype(dtype)
        if self.codebook is not None:
            whole = self.levels.astype(np.float32)
            edges = jnp.asarray((whole[1:] + whole[:-1]) / 2, dtype)
            return jnp.searchsorted(edges, codes).astype(dtype) + self.low
        if zero_point is not None:
            codes = codes + zero_point
        return jnp.clip(jnp.round(codes), self.low, self.high)

    def decode(self, codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None) -> jax.Array:
        """Real values of codes, in the type of the scale (at least float32)."""
        dtype = jnp.promote_types(scale.dtype, jnp.float32)
        real = codes.astype(dtype) if self.codebook is None else self.operands(codes).astype(dtype)
        return (real if zero_point is None else real - zero_point) * scale
