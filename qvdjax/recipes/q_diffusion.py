"""q-diffusion-*: searched static ranges, and ranges of their own for what a skip connection brings."""

import dataclasses

from qvdjax.ptq.range_search import RangeSearch
from qvdjax.recipes.minmax import MinMax


@dataclasses.dataclass(frozen=True)
class QDiffusion(MinMax):
    """Static ranges by search at all steps, and a split shortcut (Li et al., ICCV 2023, arXiv 2302.04304).

    A layer of a UNet's way up reads the sample and a skip connection, one behind the other, whose values differ in
    size: Q(X) = [Q1(X1), Q2(X2)] and Q(W) = [Q1(W1), Q2(W2)], in `conv1` and `conv_shortcut` of every ResNet there.
    Steps of calibration are evenly spaced, as in every calibration set of a sampler. Ranges are narrowed to the least
    2.4-norm of the error, of weights in 80 steps, of inputs from 1 to 0.5 in 51.
    Left open or not followed, and chosen here: ranges of inputs are averaged over the batches of the calibration set;
    symmetric weights, as in every recipe; no block reconstruction (`adaround` is that, for transformers). Transformers
    have no such connections, so on them only the search is left.
    Command: `qvdjax quantize DIR OUT --recipe q-diffusion-w8a8 --calibration CALIBRATION`.
    Expected: better than mse where skip connections are larger or smaller than the sample. Published: none for video
    models by itself.
    """

    weight_range: str = "search"
    activation_symmetric: bool = False
    split_inputs: bool = True

    name = "q-diffusion"

    def range_search(self) -> RangeSearch:
        """Both ends narrowed alike, by the 2.4-norm."""
        return RangeSearch("shrink", norm=2.4)
