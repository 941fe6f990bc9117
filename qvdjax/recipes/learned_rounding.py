"""What methods that learn the rounding of weights block by block have in common."""

import dataclasses

from qvdjax.calibration.selection import Selection
from qvdjax.ptq.reconstruction import AdaptiveRounding, Reconstruction
from qvdjax.recipes.method import Method


@dataclasses.dataclass(frozen=True)
class LearnedRounding(Method):
    """The rounding of every weight inside blocks is learned, block after block (AdaRound in BRECQ's blocks).

    Attributes:
        learn: Learn the rounding; false for the nearest codes.
        samples: Steps that are trained on, each with the prompt and with the negative prompt.
        iterations: Steps of a block's training, rounded up to whole passes over the samples.
        batch: Model inputs in a step.
        rate: Adam's.
        penalty: lambda, what an undecided rounding costs.
        warm_up: Share of the iterations before it counts.
        beta_start, beta_end: Exponent of the penalty after the warm-up and at the end.
        p: Power of the differences between outputs (2.4 in Q-Diffusion).
        inputs: "propagated" through the quantized blocks before, or "full_precision".
        features: Where a UNet's layers that add the timestep to a block are trained: "timestep" before all blocks, on
            the timesteps of the calibration set alone, or "block" with the others of their block.
        seed: Of the samples.
    """

    weight_range: str = "search"
    learn: bool = True
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
    features: str = "timestep"
    seed: int = 0

    calibrates_on_all = True

    def __post_init__(self):
        if self.learn and self.codebook is not None:
            raise ValueError("rounding is learned between neighbours of an even grid: leave codebook out")

    def reconstruction(self) -> Reconstruction | None:
        """The training of roundings."""
        if not self.learn:
            return None
        rounding = AdaptiveRounding(self.penalty, self.warm_up, self.beta_start, self.beta_end, self.rate)
        return Reconstruction(
            iterations=self.iterations, batch=self.batch, unit="change", power=self.p, rounding=rounding,
            selection=Selection(self.samples, "random", seed=self.seed), token_weights=None, inputs=self.inputs,
            features=self.features,
        )  # fmt: skip
