"""adaround-*: learn for each weight whether it is rounded up or down."""

import dataclasses

from qvdjax.recipes.learned_rounding import LearnedRounding


@dataclasses.dataclass(frozen=True)
class AdaRound(LearnedRounding):
    """rtn whose weights are rounded up or down as a block's output asks (Nagel et al. 2020, arXiv 2004.10568).

    Blocks are trained one after the other towards their full-precision output, as in BRECQ (Li et al. 2021, arXiv
    2102.05426), on inputs that come through the quantized blocks before (`inputs`). Only the choice between the two
    codes next to a weight is trained, of every linear layer and convolution in a block, modulation layers too; the
    range of each output channel is searched before. What is kept are codes, as of any other recipe. In a UNet a block
    is one layer of a level with its ResNet and transformers; the layers that add the timestep to it are trained before,
    on the timestep alone (`features`).

    Left open by the sources, which quantize image classifiers, or chosen otherwise here: input ranges are dynamic, one
    a token and for a convolution one a sample, and not trained; batches of one video, whose tokens are more than those
    of the 32 images that releases take; steps in the order of the examples; `samples` random steps of the calibration
    set with both guidance branches; 2,000 iterations at a rate of 1e-2 where releases have 20,000 at 1e-3: a logit can
    go as far, in a tenth of the time (`iterations=20000 rate=1e-3` is theirs). What the penalty weighs against is in
    `AdaptiveRounding`.
    Command: `qvdjax quantize DIR OUT --recipe adaround-w4a8 --calibration CALIBRATION`.
    Expected: less error than rtn at 4 bits of weights and below, little to gain at 8; what the inputs lose stays.
    Published: none for video models by itself; Q-Diffusion and PTQ4DiT end with it.
    """

    name = "adaround"
