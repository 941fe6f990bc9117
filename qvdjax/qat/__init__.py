"""Quantization-aware training."""

from qvdjax.qat.auxiliary import with_gamma, with_low_rank, without_auxiliary
from qvdjax.qat.deployment import deploy
from qvdjax.qat.learned_linear import (
    ClipLogit,
    LearnedLinear,
    LearnedScale,
    LearnedZeroPoint,
    learned,
)
from qvdjax.qat.straight_through import FakeQuantizedLinear, fake_quantized

__all__ = [
    "ClipLogit",
    "FakeQuantizedLinear",
    "LearnedLinear",
    "LearnedScale",
    "LearnedZeroPoint",
    "deploy",
    "fake_quantized",
    "learned",
    "with_gamma",
    "with_low_rank",
    "without_auxiliary",
]
