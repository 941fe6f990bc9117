"""Quantization-aware training."""

from qvdjax.qat.adapter import Adapter, AdapterFactor, with_adapters
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
from qvdjax.qat.phases import begin_step, small_share_of_phi
from qvdjax.qat.phi import Factor, LowRank, low_rank
from qvdjax.qat.rank_decay import RankDecay
from qvdjax.qat.straight_through import FakeQuantizedLinear, fake_quantized

__all__ = [
    "Adapter",
    "AdapterFactor",
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
    "small_share_of_phi",
    "with_adapters",
    "with_gamma",
    "with_low_rank",
    "without_auxiliary",
]
