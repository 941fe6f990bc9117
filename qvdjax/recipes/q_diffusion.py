"""q-diffusion-*: learned rounding, searched static ranges, and ranges of their own for skip connections."""

import dataclasses

from qvdjax.recipes.learned_rounding import LearnedRounding
from qvdjax.recipes.searched_ranges import SearchedRanges


@dataclasses.dataclass(frozen=True)
class QDiffusion(LearnedRounding, SearchedRanges):
    """Rounding learned block by block, static ranges by search at all steps, and a split shortcut (Li et al., ICCV
    2023, arXiv 2302.04304; Xiuyu-Li/q-diffusion at 715783d).

    A layer of a UNet's way up reads the sample and a skip connection, one behind the other, whose values differ in
    size: Q(X) = [Q1(X1), Q2(X2)] and Q(W) = [Q1(W1), Q2(W2)], in `conv1` and `conv_shortcut` of every ResNet there.
    Steps of calibration are evenly spaced, as in every calibration set of a sampler. Ranges are narrowed to the least
    2.4-norm of the error, of weights in 80 steps, of inputs from 1 to 0.5 in 51. Then the rounding of weights is
    learned as `adaround` says, with the 2.4-norm of what blocks make; layers that add the timestep are part of their
    blocks.
    Left open or not followed, and chosen here: ranges of inputs are not trained, where the release takes 5,000 further
    steps for that, and inputs are rounded by them while roundings are learned; one video a step, 2,000 steps a block at
    a rate of 1e-2 where the release has 20,000 (`iterations`, `rate`); symmetric weights, as in every recipe; the
    products of attention stay float (the release: 8 bits, softmax 16). On transformers, which have no such connections,
    the split is not there.
    Command: `qvdjax quantize DIR OUT --recipe q-diffusion-w8a8 --calibration CALIBRATION`.
    Expected: better than mse where skip connections are larger or smaller than the sample, and below 8 bits of weights.
    Published: none for video models by itself.
    """

    activation_symmetric: bool = False
    split_inputs: bool = True
    p: float = 2.4
    features: str = "block"

    name = "q-diffusion"
    error_norm = 2.4
