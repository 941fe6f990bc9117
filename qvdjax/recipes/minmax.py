"""minmax-*: static ranges from calibration."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class MinMax(Method):
    """As rtn, but each layer's input has one range for all tokens, steps and prompts, seen in calibration.

    The cheapest form at run time (no range to compute), and the one that heavy channels and changing time steps hurt
    most. Source: the static min-max baseline of QVD (2407.11585) and of PTQ4DM.
    Command: `qvdjax quantize DIR OUT --recipe minmax-w8a8 --calibration CALIBRATION`.
    Expected: worse than rtn at the same bits.
    """

    name = "minmax"

    def activation(self) -> Quantizer | None:
        """Static, one range a tensor."""
        dynamic = super().activation()
        return dynamic and dataclasses.replace(dynamic, granularity="tensor", dynamic=False)
