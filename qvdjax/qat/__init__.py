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
from qvdjax.qat.orthogonal import BasisChange, reorthogonalize, singular_values, small_share
from qvdjax.qat.phases import begin_step
from qvdjax.qat.phi import Factor, LowRank, low_rank
from qvdjax.qat.rank_decay import RankDecay
from qvdjax.qat.straight_through import FakeQuantizedLinear, fake_quantized

__all__ = [
    "BasisChange",
    "ClipLogit",
    "Factor",
    "FakeQuantizedLinear",
    "LearnedLinear",
    "LearnedScale",
    "LearnedZeroPoint",
    "LowRank",
    "RankDecay",
    "begin_step",
    "deploy",
    "fake_quantized",
    "learned",
    "low_rank",
    "reorthogonalize",
    "singular_values",
    "small_share",
    "with_gamma",
    "with_low_rank",
    "without_auxiliary",
]
