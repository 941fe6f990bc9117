"""QTensor: integer codes together with what turns them back into real numbers."""

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, repeat

from qvdjax.numerics.grid import Grid
from qvdjax.numerics.quantizer import Quantizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A quantized array.

    Invariants (each a property test):
      1. `codes` is a signed integer array [..., rows, width]; every code lies in
         [-2**(bits-1), 2**(bits-1) - 1], whatever the integer type can hold.
      2. `scale` is floating, at least float32, positive and finite, shaped [..., rows or 1, groups], where
         groups * group width = width; leading axes are those of `codes`, or 1.
      3. `zero_point` is None (symmetric) or has the shape and type of `scale`; it is in units of codes.
      4. real = (codes - zero_point) * scale, group by group along the last axis; with a `codebook`, level * scale,
         or float8 * scale.
      5. Quantizing the real values again with the same scale and zero point gives the same codes.
      6. `bits` is the logical width: `logical_bits` and every reported size use it, never `nbytes`, because
         some devices keep one sub-byte code in a whole byte.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    bits: int = dataclasses.field(metadata={"static": True})
    codebook: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def operands(self) -> jax.Array:
        """What products multiply: int8, or float8."""
        return self.grid.operands(self.codes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the codes and of the real values."""
        return self.codes.shape

    @property
    def groups(self) -> int:
        """Number of ranges along the last axis."""
        return self.scale.shape[-1]

    @property
    def grid(self) -> Grid:
        """The grid the codes live on."""
        return Grid(self.bits, self.zero_point is None, self.codebook)

    @property
    def logical_bits(self) -> int:
        """Bits of the codes, scales and zero points, by their logical widths."""
        zero_points = 0 if self.zero_point is None else self.zero_point.size
        return self.codes.size * self.bits + (self.scale.size + zero_points) * self.scale.dtype.itemsize * 8

    def _spread(self, parameter: jax.Array) -> jax.Array:
        """[..., rows or 1, groups] -> broadcastable against [..., rows, width]."""
        if parameter.shape[-1] == 1:
            return parameter
        return repeat(parameter, "... groups -> ... (groups size)", size=self.shape[-1] // self.groups)

    def dequantize(self) -> jax.Array:
        """Real values [..., rows, width] in the scale's type."""
        zero_point = None if self.zero_point is None else self._spread(self.zero_point)
        return self.grid.decode(self.codes, self._spread(self.scale), zero_point)


def storage_dtype(bits: int) -> jnp.dtype:
    """Integer type that holds codes in memory: int4 up to four bits (TPU keeps it packed), int8 above."""
    return jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)


def encode(x: jax.Array, grid: Grid, scale: jax.Array, zero_point: jax.Array | None, dtype=None) -> QTensor:
    """Quantize x [..., rows, width] with a given scale and zero point, each [..., rows or 1, groups].

    `dtype` is the integer type of the codes, by default `storage_dtype(bits)`.
    """
    grouped = rearrange(x, "... (groups size) -> ... groups size", groups=scale.shape[-1])
    codes = grid.encode(grouped, scale[..., None], None if zero_point is None else zero_point[..., None])
    codes = rearrange(codes, "... groups size -> ... (groups size)")
    return QTensor(codes.astype(dtype or storage_dtype(grid.bits)), scale, zero_point, grid.bits, grid.codebook)


def quantize(x: jax.Array, quantizer: Quantizer, dtype=None) -> QTensor:
    """Quantize x [..., rows, width], its range chosen from x itself as `quantizer` says."""
    return encode(x, quantizer.grid, *quantizer.scale_of(x), dtype)


def sqnr_db(x: jax.Array, approximation: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """Signal-to-quantization-noise ratio 10 log10(sum x^2 / sum (x - approximation)^2), in decibels.

    Summed over `axes` (all by default). Infinite where the two are equal.
    """
    x, approximation = (a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in (x, approximation))
    signal, noise = ((a**2).sum(axes) for a in (x, x - approximation))
    return jnp.where(noise > 0, 10 * jnp.log10(signal / jnp.where(noise > 0, noise, 1)), jnp.inf)
