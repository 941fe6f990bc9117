"""ptq4dit-*: balance channels between input and weight with regard to all timesteps, then learn the rounding."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.ptq.range_search import RangeSearch
from qvdjax.ptq.transforms import FitChannelScale
from qvdjax.recipes.adaround import AdaRound


@dataclasses.dataclass(frozen=True)
class PTQ4DiT(AdaRound):
    """adaround behind a scale that brings input and weight channels to one size (Wu et al., NeurIPS 2024, arXiv
    2405.16005).

    Channel-wise salience balancing: with s(X) and s(W) the largest magnitudes of each channel, inputs are divided by
    (s(X) / s(W))^(1/2) and weights multiplied, so that both have the size (s(X) s(W))^(1/2). Spearman's rho-guided
    salience calibration: s(X) is a mean over timesteps, of which those count more whose heavy channels are not the
    weight's (`qvdjax.calibration.salience`). The scale of attention's output layer is put into the weights that make
    the values (`absorb`), at no cost; then rounding is learned block by block as `adaround` says.

    The released code scales query, key, value, attention's output and the first layer of the feed-forward, and so does
    this; query, key and value have a scale each here, where the release has one. Chosen otherwise, so that rows of a
    table quantize alike: input ranges are dynamic, one a token (`static=true` has the paper's, one a layer; the release
    trains their steps too, which this does not), attention's products stay float (`attention_pv_bits=8` is near the
    release's softmax), iterations and batches are `adaround`'s. The paper also puts the scales of modulated norms into
    the layer that makes the modulation; Wan's is shared by all blocks, so that these are divided by online.
    Command: `qvdjax quantize DIR OUT --recipe ptq4dit-w4a8 --calibration CALIBRATION`.
    Expected: better than smoothquant at 4 bits of weights, by the learned rounding. Published: FID 4.63 at W8A8 of
    DiT-XL/2, 250 steps, against 4.53 in full precision; VBench imaging quality and scene consistency of CogVideoX-2B
    (S2Q-VDiT's tables) 42.91, 17.88 at W4A6 and 20.66, 2.11 at W4A4, against 58.69, 33.79.

    Attributes:
        salience: "spearman" as published, or "largest" for the largest magnitude at any timestep.
        absorb: Put scales into weights where that is exact; false divides by all of them online.
        static: One fixed range a layer for its input, the mean over calls of smallest and largest value.
    """

    salience: str = "spearman"
    absorb: bool = True
    static: bool = False

    name = "ptq4dit"
    transformed = ("query", "key", "value", "attention_output", "feed_forward_in")
    calibrates_on_all = False

    def __post_init__(self):
        super().__post_init__()
        if self.salience not in ("spearman", "largest"):
            raise ValueError(f"unknown salience {self.salience!r}: use spearman or largest")
        if self.static and (self.codebook is not None or self.activation_group_size is not None):
            raise ValueError("a static range is one a layer: leave codebook and activation_group_size out")

    def activation(self) -> Quantizer | None:
        """Dynamic, one range a token, or static, one a tensor."""
        quantizer = super().activation()
        if quantizer is None or not self.static:
            return quantizer
        return dataclasses.replace(quantizer, granularity="tensor", dynamic=False)

    def transform(self) -> FitChannelScale:
        """The balance."""
        return FitChannelScale(0.5, absorb=self.absorb)

    def range_search(self) -> RangeSearch:
        """Static ranges: the widest of each call."""
        return RangeSearch("minmax")

    def channel_statistics(self) -> str:
        """What s(X) is."""
        return "salience" if self.salience == "spearman" else "all"
