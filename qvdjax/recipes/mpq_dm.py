"""mpq-dm-*: output channels with outliers have one bit more, others one less; a static range for each timestep."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.ptq.channel_bits import ChannelBits
from qvdjax.ptq.transforms import FitChannelScale
from qvdjax.recipes.searched_ranges import SearchedRanges


@dataclasses.dataclass(frozen=True)
class MPQDM(SearchedRanges):
    """Bits shared out among the output channels of each weight, behind a channel scale (Feng et al., AAAI 2025, arXiv
    2412.11549; cantbebetter2/MPQ-DM at 2b05dd7): the part of it that trains nothing.

    Outlier-driven mixed quantization: inputs are divided by sqrt(max|x| / max|w|) of each channel; then the tenth of
    the output channels with the largest kurtosis has one bit more and the tenth with the smallest one less, in layers
    whose output gains by it (`qvdjax.ptq.channel_bits`). Ranges of inputs are static, one for each timestep. A layer's
    codes lie in one array as wide as its widest channel, so that such layers are stored in one bit more than the recipe
    says, and `qvdjax info` says so.
    Not followed: the source then trains branches of rank 32 and all steps towards the full-precision model
    (EfficientDM's way, which `efficientdm` trains), with a loss on the similarity of features of neighbouring steps.
    Left open, and chosen here: ranges of inputs are narrowed by squared error; the scale is divided by online, also
    before convolutions; nothing is shared out at 8 bits of weights, and 2 are the fewest of a channel.
    Command: `qvdjax quantize DIR OUT --recipe mpq-dm-w4a6 --calibration CALIBRATION`.
    Expected: ahead of mse at 3 and 4 bits of weights. Published: for images, with training; none for video models.

    Attributes:
        share: Of the output channels that have more bits, and as many less.
        alpha: Of the scale, as SmoothQuant's; none for no scale.
    """

    weight_range: str = "search"
    activation_symmetric: bool = False
    temporal_features: str = "step"
    share: float = 0.1
    alpha: float | None = 0.5

    name = "mpq-dm"
    transforms_convolutions = True

    def __post_init__(self):
        if self.average_bits is not None or self.codebook is not None or self.split_inputs:
            raise ValueError("bits are shared out among channels: leave average_bits, codebook and split_inputs out")

    def activation(self) -> Quantizer | None:
        """Static, one range a timestep."""
        tensor = super().activation()
        return tensor and dataclasses.replace(tensor, granularity="step")

    def transform(self) -> FitChannelScale | None:
        """The scale."""
        return None if self.alpha is None else FitChannelScale(self.alpha)

    def channel_bits(self) -> ChannelBits:
        """How bits are shared out."""
        return ChannelBits(self.share)
