"""dvd-quant-*: no data: refined weight grids, rotated inputs with ranges by blocks of channels."""

import dataclasses

from qvdjax.nn import Rotation
from qvdjax.ptq.transforms import FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class DVDQuant(Method):
    """quarot with weight grids of least squared error and a range for each block of a token's channels (Li et al.,
    ICLR 2026, arXiv 2505.18663). It needs no calibration.

    Bounded-init grid refinement: scale and zero point of each row of an asymmetric weight are refined in turns with its
    codes (`qvdjax.numerics.refinement`), from the shrunk range of least error. Auto-scaling rotated quantization, in
    the block-wise form that the source deploys: after the rotation each block of `activation_group_size` channels of a
    token has a range of its own.

    Left open or not followed, and chosen here: a scale for each channel (the source's other form) is no product of
    integers; bits do not change over the steps (the source switches between 4 and 8 as the prediction changes), so that
    rows of a table have the same bits.
    Command: `qvdjax quantize DIR OUT --recipe dvd-quant-w4a4`.
    Expected: better than quarot without data. Published, VBench aesthetic, imaging quality and overall consistency of
    HunyuanVideo: 62.27, 64.22, 25.83 at W4A6 and 61.96, 61.82, 25.68 at W4A4, against 62.53, 64.78, 25.86 in full
    precision, with bits that change.

    Attributes:
        block: Most channels of a rotated block; none for as many as there are.
        seed: Of the rotation's signs.
    """

    weight_symmetric: bool = False
    weight_range: str = "refine"
    activation_group_size: int | None = 128
    block: int | None = None
    seed: int = 0

    name = "dvd-quant"

    def transform(self) -> FitRotation:
        """The rotation."""
        return FitRotation(Rotation(self.block), self.seed)
