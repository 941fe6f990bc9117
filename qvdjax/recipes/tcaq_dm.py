"""tcaq-dm-*: channels of convolutions' inputs are evened with regard to all timesteps; rounding is learned."""

import dataclasses

from qvdjax.ptq.transforms import FitEvenChannels
from qvdjax.recipes.learned_rounding import LearnedRounding
from qvdjax.recipes.searched_ranges import SearchedRanges


@dataclasses.dataclass(frozen=True)
class TCAQDM(LearnedRounding, SearchedRanges):
    """Static ranges behind a channel scale of convolutions that all timesteps have a say in, then learned rounding
    (Huang et al., AAAI 2025, arXiv 2412.16700).

    No code was published and the paper's equations were not at hand; known are its three parts by name and purpose.
    Each has a stand-in here:
    Temporal-channel joint reparameterization (TCR): a scale for each channel of a convolution's input, whose factors
    weigh all timesteps. Here r_c is the mean over steps of the channel's largest magnitude, and inputs are divided by
    (r_c / median of r)^`strength`, weights multiplied.
    Progressively aligned reconstruction (PAR): blocks are calibrated on what the quantized blocks before them give.
    Here blocks are reconstructed as `adaround` says, with `inputs=propagated`.
    Dynamically adaptive quantizer (DAQ): the kind of grid of softmax outputs follows from their distribution. The
    products of attention stay float in all recipes of a table, so nothing of it is here; `attention_pv_bits` rounds
    them on a uniform grid.
    Command: `qvdjax quantize DIR OUT --recipe tcaq-dm-w6a6 --calibration CALIBRATION`.
    Expected: ahead of q-diffusion where channels of convolutions differ in size. Published: for images, usable at W4A4
    and near full precision at W6A6 on CIFAR-10; none for video models.

    Attributes:
        weighing: How timesteps weigh in r_c: "mean", all alike, or "largest", the largest alone.
        strength: Of the scale, 0 to 1.
    """

    activation_symmetric: bool = False
    temporal_features: str = "step"
    weighing: str = "mean"
    strength: float = 1.0

    name = "tcaq-dm"
    transformed = ()
    transforms_convolutions = True

    def __post_init__(self):
        super().__post_init__()
        if self.weighing not in ("mean", "largest"):
            raise ValueError(f"unknown weighing {self.weighing!r}: use mean or largest")

    def transform(self) -> FitEvenChannels:
        """The scale of convolutions."""
        return FitEvenChannels(self.strength)

    def channel_statistics(self) -> str:
        """What r_c is."""
        return "magnitude" if self.weighing == "mean" else "all"
