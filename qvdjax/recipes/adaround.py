"""adaround-*: learn for each weight whether it is rounded up or down."""

import dataclasses

from qvdjax.calibration.selection import Selection
from qvdjax.ptq.reconstruction import AdaptiveRounding, Reconstruction
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class AdaRound(Method):
    """rtn whose weights are rounded up or down as a block's output asks (Nagel et al. 2020, arXiv 2004.10568).

    Blocks are trained one after the other towards their full-precision output, as in BRECQ (Li et al. 2021, arXiv
    2102.05426), on inputs that come through the quantized blocks before (`inputs`). Only the choice between the two
    codes next to a weight is trained, of every linear layer in a block, modulation layers too; the range of each output
    channel is searched before. What is kept are codes, as of any other recipe.

    Left open by the sources, which quantize convolutional networks, or chosen otherwise here: input ranges are dynamic,
    one a token, and not trained; batches of one video, whose tokens are more than those of the 32 images that releases
    take; steps in the order of the examples; `samples` random steps of the calibration set with both guidance branches;
    2,000 iterations at a rate of 1e-2 where releases have 20,000 at 1e-3: a logit can go as far, in a tenth of the time
    (`iterations=20000 rate=1e-3` is theirs). What the penalty weighs against is in `AdaptiveRounding`.
    Command: `qvdjax quantize DIR OUT --recipe adaround-w4a8 --calibration CALIBRATION`.
    Expected: less error than rtn at 4 bits of weights and below, little to gain at 8; what the inputs lose stays.
    Published: none for video models by itself; Q-Diffusion and PTQ4DiT end with it.

    Attributes:
        samples: Steps that are trained on, each with the prompt and with the negative prompt.
        iterations: Steps of a block's training, rounded up to whole passes over the samples.
        batch: Model inputs in a step.
        rate: Adam's.
        penalty: lambda, what an undecided rounding costs.
        warm_up: Share of the iterations before it counts.
        beta_start, beta_end: Exponent of the penalty after the warm-up and at the end.
        p: Power of the differences between outputs (2.4 in Q-Diffusion).
        inputs: "propagated" through the quantized blocks before, or "full_precision".
        seed: Of the samples.
    """

    weight_range: str = "search"
    samples: int = 40
    iterations: int = 2000
    batch: int = 1
    rate: float = 1e-2
    penalty: float = 0.01
    warm_up: float = 0.2
    beta_start: float = 20.0
    beta_end: float = 2.0
    p: float = 2.0
    inputs: str = "propagated"
    seed: int = 0

    name = "adaround"

    def __post_init__(self):
        if self.codebook is not None:
            raise ValueError("rounding is learned between neighbours of an even grid: leave codebook out")

    def reconstruction(self) -> Reconstruction | None:
        """The training of roundings."""
        rounding = AdaptiveRounding(self.penalty, self.warm_up, self.beta_start, self.beta_end, self.rate)
        return Reconstruction(
            iterations=self.iterations, batch=self.batch, unit="change", power=self.p, rounding=rounding,
            selection=Selection(self.samples, "random", seed=self.seed), token_weights=None, inputs=self.inputs,
        )  # fmt: skip
