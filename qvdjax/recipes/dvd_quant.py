"""dvd-quant-*: no data: refined weight grids, rotated inputs with ranges by blocks of channels."""

import dataclasses

from qvdjax.nn import Rotation
from qvdjax.ptq.bit_switch import SwitchBits
from qvdjax.ptq.transforms import FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class DVDQuant(Method):
    """quarot with weight grids of least squared error and a range for each block of a token's channels (Li et al.,
    ICLR 2026, arXiv 2505.18663). It needs no calibration, unless bits are switched.

    Bounded-init grid refinement: scale and zero point of each row of an asymmetric weight are refined in turns with its
    codes (`qvdjax.numerics.refinement`), from the shrunk range of least error. Auto-scaling rotated quantization, in
    the block-wise form that the source deploys: after the rotation each block of `activation_group_size` channels of a
    token has a range of its own. Guided bit switching, with `switch`: inputs have 8 bits at steps at which the
    prediction has changed by more than that since they last did (`qvdjax.ptq.bit_switch`).

    Left open or not followed, and chosen here: a scale for each channel (the source's other form) is no product of
    integers; bits do not change over the steps unless asked for, so that rows of a table have the same bits; which
    steps have 8 bits is decided beforehand on a calibration set, where the source decides while it samples.
    Command: `qvdjax quantize DIR OUT --recipe dvd-quant-w4a4`, and with `--set switch=0.1 --calibration CALIBRATION`,
    calibrated with the steps that will be sampled with, what the source calls W4A6: 6 bits on average.
    Expected: better than quarot without data. Published, VBench aesthetic, imaging quality and overall consistency of
    HunyuanVideo: 62.27, 64.22, 25.83 at W4A6 and 61.96, 61.82, 25.68 at W4A4, against 62.53, 64.78, 25.86 in full
    precision, with bits that change.

    Attributes:
        block: Most channels of a rotated block; none for as many as there are.
        seed: Of the rotation's signs.
        switch: Change of the prediction after which a step has inputs of `switch_bits`; none for the recipe's bits at
            all steps. The source tries 0.06 to 0.18.
        switch_bits: Of these steps.
    """

    weight_symmetric: bool = False
    weight_range: str = "refine"
    activation_group_size: int | None = 128
    block: int | None = None
    seed: int = 0
    switch: float | None = None
    switch_bits: int = 8

    name = "dvd-quant"

    def transform(self) -> FitRotation:
        """The rotation."""
        return FitRotation(Rotation(self.block), self.seed)

    def switched_bits(self) -> SwitchBits | None:
        """Where it is asked for."""
        return None if self.switch is None else SwitchBits(self.switch, self.switch_bits)
