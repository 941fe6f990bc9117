"""vidit-q-*: move what is static into the weight, spread what is dynamic by a rotation."""

import dataclasses

from qvdjax.nn import Rotation, TimestepIntervals
from qvdjax.ptq.transforms import FitChannelScale, FitProduct, FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class ViDiTQ(Method):
    """rtn after SmoothQuant's scale and then QuaRot's rotation (Zhao et al., ICLR 2025, arXiv 2406.02540).

    The scale takes what is uneven among channels at all steps, the rotation what changes with the timestep's
    modulation: y = Q(x diag(s)^-1 H) Q(W diag(s) H)^T. Ranges are dynamic, one a token.

    Left open or not followed, and chosen here: one scale for all timesteps unless asked for (the older release has one
    for timesteps up to 500 and one above, which is `timestep_intervals` of 2: the scale is in the codes, of which there
    are then twice as many); alpha 0.5 (the releases have 0.11 at 4 bits of weights, tuned for Open-Sora); no mixed
    precision unless asked for by `average_bits`, so that rows of a table have the same bits.
    Command: `qvdjax quantize DIR OUT --recipe vidit-q-w4a4 --calibration CALIBRATION`.
    Expected: about as quarot, better where the same channels are heavy at all steps. Published, VBench imaging quality
    and scene consistency of CogVideoX-2B (S2Q-VDiT's tables): 51.94, 22.17 at W4A6 and 45.56, 11.91 at W4A4, against
    58.69, 33.79 in full precision.

    Attributes:
        alpha: 0 leaves the inputs as they are, 1 moves all of their spread into the weight.
        block: Most channels of a rotated block; none for as many as there are.
        seed: Of the signs.
        timestep_intervals: Of one length, each with scales and codes of its own; 1 for one of both in all.
    """

    alpha: float = 0.5
    block: int | None = None
    seed: int = 0
    timestep_intervals: int = 1

    name = "vidit-q"

    def transform(self) -> FitProduct:
        """Scale, then rotation."""
        return FitProduct(FitChannelScale(self.alpha), FitRotation(Rotation(self.block), self.seed))

    def intervals(self) -> TimestepIntervals | None:
        """Where there is more than one."""
        return None if self.timestep_intervals == 1 else TimestepIntervals.alike(self.timestep_intervals)
