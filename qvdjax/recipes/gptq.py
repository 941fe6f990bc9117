"""gptq-*: round weights so that later columns make up for the errors of earlier ones."""

import dataclasses

from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.transforms import FitRotation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class GPTQ(Method):
    """rtn whose weights are rounded column by column, with the errors of a layer's output over calibrated inputs
    compensated (Frantar et al. 2022, arXiv 2210.17323, algorithm 1).

    Left open by the source, which quantizes the weights of language models alone, and chosen here: inputs are those
    that the full-precision model meets while it samples, before they are quantized themselves; scales are taken from
    the weight before rounding, also in groups; channels that are always zero are rounded to the nearest code instead of
    being cleared; convolutions are rounded to the nearest code. Second moments take 4 in**2 bytes a layer and block,
    68 GB for Wan 2.1 14B, 12 GB for its 1.3B and 9 GB for CogVideoX-2B; the calibration set is gone over once for each
    `memory` GiB of them.
    Command: `qvdjax quantize DIR OUT --recipe gptq-w4a4 --calibration CALIBRATION`; `--set rotation=true` puts the
    rotation of `quarot-*` before it.
    Expected: less output error than rtn at the same bits of weights, most at 4 and below; what the inputs lose stays.
    Published: none for video models by itself; S2Q-VDiT and SVDQuant end with it.

    Attributes:
        damping: Added to the diagonal of the second moments, in units of its mean.
        act_order: Columns of large inputs first.
        block: Columns after which errors are handed on to all later ones at once; changes the speed alone.
        memory: GiB of second moments collected in one pass over the calibration set.
        rotation: Rotate inputs as `quarot-*` does, and round the rotated weight.
        rounded_inputs: Fit the weight to inputs as they are rounded, and compensate for those (GPTAQ, arXiv
            2504.02692, but for the errors of earlier layers).
    """

    damping: float = 0.01
    act_order: bool = False
    block: int = 128
    memory: float = 4.0
    rotation: bool = False
    rounded_inputs: bool = False

    name = "gptq"

    def rounding(self) -> ErrorCompensation:
        """The compensated rounding."""
        return ErrorCompensation(self.damping, self.act_order, self.block, self.memory, self.rounded_inputs)

    def transform(self) -> FitRotation | None:
        """The rotation, where it is asked for."""
        return FitRotation() if self.rotation else None
