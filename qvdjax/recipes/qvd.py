"""qvd-*: quantization of video UNets that keeps timesteps apart and brings channels' ranges together."""

import dataclasses

from qvdjax.ptq.range_search import RangeSearch
from qvdjax.ptq.transforms import FitChannelScale, FitShift
from qvdjax.recipes.minmax import MinMax


@dataclasses.dataclass(frozen=True)
class QVD(MinMax):
    """Static ranges by search, behind a shift of each channel; temporal features on a grid that keeps them apart.

    Source: arXiv 2407.11585 (ACM MM 2024): HTDQ for temporal features, SCRI for the ranges of channels. The paper's
    text was not at hand; what is here was read in the port of the authors' code (PaddleSlim `example/QVD`), which has
    holes, and where that is silent, chosen and named below. Published: FVD 442 at W8A8 in that port's README, and 205
    less than existing methods at W8A8 in the abstract; model and set are not stated with either.
    Command: `qvdjax quantize DIR OUT --recipe qvd-w8a8 --calibration CALIBRATION`.
    Expected: near the full-precision model at W8A8, and ahead of `minmax` below.

    HTDQ: the input of every `time_emb_proj` is rounded to one of several grids, chosen by how well timesteps can still
    be told apart (`qvdjax.ptq.feature_grids`); fitted to the timesteps of the calibration set, which are all there are.
    `temporal_features=log2` is the released quantizer. SCRI: the middle of each channel's range over the first sampling
    step is subtracted before rounding, and what that takes off the product is in the bias, also at zero-padded borders.
    The release has no call of it left, so all layers with tokens or positions have one; query, key and value, which see
    one input, share it by construction. Its optional second part, a scale, is off in the release.

    Left open by the sources: the score by which HTDQ chooses; which layers are shifted; ranges of frames, which the
    release has for spatial layers, are not offered. The first and the last convolution stay float as in every recipe
    here (8 bits in the release), and so do the layers that make the time embedding.

    Attributes:
        statistics: "first" takes the ranges of channels from the first sampling step, as released; "all" from all.
        static_range: How the static range follows from the shifted input: "magnitude", "shrink" or "minmax"
            (`qvdjax.ptq.range_search`).
        shift: False leaves SCRI out.
        scale_alpha: After the shift each channel is divided by SmoothQuant's scale of this alpha; none for no scale.
            The release has the scale of Outlier Suppression+ in this place, switched off.
        temporal_features: See `Method`; "auto" is HTDQ.
    """

    activation_symmetric: bool = False
    temporal_features: str = "auto"
    statistics: str = "first"
    static_range: str = "magnitude"
    shift: bool = True
    scale_alpha: float | None = None

    name = "qvd"
    transforms_convolutions = True

    def __post_init__(self):
        if self.statistics not in ("first", "all"):
            raise ValueError(f"unknown statistics {self.statistics!r}: use first or all")
        if self.scale_alpha is not None and not self.shift:
            raise ValueError("the scale comes behind the shift: leave scale_alpha out, or take `smoothquant`")
        if self.average_bits is not None:
            raise ValueError("what a shifted input does to a rounded weight is not measured: leave average_bits out")

    def transform(self) -> FitShift | None:
        """The shift."""
        if not self.shift:
            return None
        return FitShift(None if self.scale_alpha is None else FitChannelScale(self.scale_alpha))

    def range_search(self) -> RangeSearch:
        """How static ranges are found."""
        return RangeSearch(self.static_range)

    def channel_statistics(self) -> str:
        """Over which steps the ranges of channels are taken."""
        return self.statistics
