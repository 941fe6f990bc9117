"""svdquant-*: a low-rank branch takes what is hard to round out of the weight."""

import dataclasses

from qvdjax.nn import LowRank
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.transforms import FitChannelScale
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class SVDQuant(Method):
    """smoothquant, and beside each product a branch of low rank in full precision (Li et al. 2024, arXiv 2411.05007).

    The smoothed weight W is split into its best approximation U V of rank r and a residual that is rounded:
    y = Q(x) Q(W - U V)^T + x V^T U^T, with x the smoothed input.

    Left open by the source's summary or not followed, and chosen here: one alpha for all layers, where the release
    searches it layer by layer; ranges a channel of the weight and a token, where the release has groups of 64
    (`group_size=64` gives the weight's); nearest codes, with GPTQ for the residual as an option; one decomposition,
    without going on from the residual's rounding error; the branch in the type of the weights; layers whose weights
    alone are quantized, and convolutions, have none. The two thin products are not fused with the quantized one, which
    on GPUs costs 57 % more time than a layer without them (the release's README), so expect smaller files, not speed.
    Command: `qvdjax quantize DIR OUT --recipe svdquant-w4a4 --calibration CALIBRATION`.
    Expected: better than smoothquant at 4 bits of weights and below, about equal at 8. Published, VBench imaging
    quality, dynamic degree and scene consistency of CogVideoX-2B at W4A6: 58.27, 40.83, 27.69 against 59.15, 67.78,
    36.24 in full precision (QVGen's table); of Wan 2.1 1.3B at W4A4: 57.57, 72.22, 12.73 against 64.30, 70.28, 28.05
    (OrbitQuant's).

    Attributes:
        rank: Of the branch.
        narrow_below: Layers whose smaller side is below this have branches of `narrow_rank`; 0 for none.
        narrow_rank: Of these.
        alpha: 0 leaves the inputs as they are, 1 moves all of their spread into the weight.
        gptq: Round the residual as `gptq-*` does.
    """

    rank: int = 32
    narrow_below: int = 0
    narrow_rank: int = 8
    alpha: float = 0.5
    gptq: bool = False

    name = "svdquant"

    def transform(self) -> FitChannelScale:
        """The channel scale."""
        return FitChannelScale(self.alpha)

    def low_rank(self) -> LowRank:
        """The branch."""
        return LowRank(self.rank, self.narrow_below, self.narrow_rank)

    def rounding(self) -> ErrorCompensation | None:
        """GPTQ's, where it is asked for."""
        return ErrorCompensation() if self.gptq else None
