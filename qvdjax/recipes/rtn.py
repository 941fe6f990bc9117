"""rtn-*: round to nearest, the baseline of every paper."""

import dataclasses

from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class RoundToNearest(Method):
    """Symmetric weights with one min-max range an output channel; inputs with one range a token, taken as they come.

    Source: the base quantizer of S2Q-VDiT (2508.04016, section 3) and of its baselines. Needs no calibration.
    Command: `qvdjax quantize DIR OUT --recipe rtn-w4a4`.
    Expected: near the full-precision model at W8A8, visibly worse at W4A4.
    """

    name = "rtn"
