"""smoothquant-*: move the spread of input channels into the weight."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.ptq.transforms import FitChannelScale
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class SmoothQuant(Method):
    """rtn after dividing each input channel by max|x|**alpha / max|w|**(1 - alpha) (Xiao et al. 2022, equation 4).

    Left open by the source, and chosen here: each layer has its own scale, also query, key and value, which share an
    input; in a video DiT a modulation stands before every product, so the scale is not folded into the norm but
    divided online.
    Command: `qvdjax quantize DIR OUT --recipe smoothquant-w4a4 --calibration CALIBRATION`.
    Expected: better than rtn where inputs have heavy channels, about equal where they have not.

    Attributes:
        alpha: 0 leaves the inputs as they are, 1 moves all of their spread into the weight; 0.5 is the paper's default.
        static: One fixed range a layer for its input, as wide as its scaled channels were seen to be (the paper's O3).
    """

    alpha: float = 0.5
    static: bool = False

    name = "smoothquant"

    def __post_init__(self):
        if self.static and (self.codebook is not None or self.activation_group_size is not None):
            raise ValueError("a static range is one a layer: leave codebook and activation_group_size out")

    def activation(self) -> Quantizer | None:
        """Dynamic, one range a token, or static, one a tensor."""
        dynamic = super().activation()
        if dynamic is None or not self.static:
            return dynamic
        return dataclasses.replace(dynamic, granularity="tensor", dynamic=False)

    def transform(self) -> FitChannelScale:
        """The channel scale."""
        return FitChannelScale(self.alpha)
