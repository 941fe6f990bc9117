"""q-dit-*: ranges by groups of input channels, of weights and of activations."""

import dataclasses

from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class QDiT(Method):
    """gptq with asymmetric ranges a group of input channels, of the weight and of each token (Chen et al., CVPR 2025,
    arXiv 2406.17343).

    Left open or not followed, and chosen here: one group size for all layers, where the source finds one for each by
    an evolutionary search towards FID or FVD of hundreds of samples. Groups are multiplied one after the other, which
    costs more than one product. Layers whose width the group size does not divide are refused by name.
    Command: `qvdjax quantize DIR OUT --recipe q-dit-w4a4 --calibration CALIBRATION --set group_size=64`, with
    `--set activation_group_size=64`.
    Expected: better than gptq for more scales. Published, VBench imaging quality and scene consistency of CogVideoX-2B
    (S2Q-VDiT's tables): 48.63, 23.84 at W4A6 and 26.26, 1.16 at W4A4, against 58.69, 33.79 in full precision.
    """

    weight_symmetric: bool = False
    activation_symmetric: bool = False
    group_size: int | None = 128
    activation_group_size: int | None = 128

    name = "q-dit"

    def rounding(self) -> ErrorCompensation:
        """GPTQ's, as the release has it."""
        return ErrorCompensation()
