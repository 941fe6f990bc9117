"""orbitquant-*: rotated, then codes of one codebook for all, without data."""

import dataclasses

from qvdjax.nn import Rotation
from qvdjax.ptq.transforms import FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class OrbitQuant(Method):
    """quarot with the levels of least error for a normal distribution in the place of an even grid (arXiv 2607.02461).

    A rotated token, and a rotated row of a weight, has entries nearly normal about zero, of its root mean square: one
    codebook serves all, and nothing is calibrated. The source simulates in floats. Here levels are whole numbers of
    -127 to 127 (`qvdjax.numerics.codebook`), so that products are of int8, accumulated in int32, as for every other
    recipe; on a device, codes are looked up before they are multiplied.

    Left open or not followed, and chosen here: no permutation of channels before the rotation, whose Hadamard matrices
    cover whole widths; codes of modulation layers and convolutions, which are not rotated, lie on even grids, and so do
    codes of 8 bits, of which int8 has no finer levels to choose from.
    Command: `qvdjax quantize DIR OUT --recipe orbitquant-w4a4`.
    Expected: better than quarot without data. Published, VBench imaging quality, aesthetic quality, scene and overall
    consistency of Wan 2.1 1.3B: 61.25, 56.08, 24.88, 24.35 at W4A6 and 58.58, 53.41, 18.81, 23.86 at W4A4, against
    64.30, 58.21, 28.05, 24.67 in full precision.

    Attributes:
        block: Most channels of a rotated block; none for as many as there are.
        seed: Of the rotation's signs.
    """

    codebook: str | None = "gaussian"
    block: int | None = None
    seed: int = 0

    name = "orbitquant"

    def transform(self) -> FitRotation:
        """The rotation."""
        return FitRotation(Rotation(self.block), self.seed)
