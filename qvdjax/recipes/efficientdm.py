"""efficientdm-*: a frozen model, low-rank adapters inside its quantizers (arXiv 2310.03270)."""

import dataclasses

from qvdjax.recipes.learned import Learned
from qvdjax.recipes.training import Training


@dataclasses.dataclass(frozen=True)
class EfficientDM(Learned):
    """EfficientDM (He et al., ICLR 2024): Q(W + B A), of which A, B and the quantizers are trained towards the teacher.

    Nothing else moves, so that the optimizer's state is a few percent of the model; A and B are added to the weights
    before they are rounded and leave nothing behind. Rates are the released code's (ThisisBillhe/EfficientDM) for a
    `--learning-rate` of 1e-4, the default: 4e-4 times a layer's mean step size for A and B, 1e-6 for step sizes, 5e-4
    for input ranges. Those are for 16000 steps.
    Left open by the source for video DiTs, and chosen here: ranges by denoising step are a learned clip of each token's
    range for each of 50 bins of the timestep (the source has one static range a step and layer); latents come from the
    data folder (the source follows the teacher along its sampler, without data: generate the folder with the teacher
    for that); first and last layers stay float, as in every preset, where the source gives them 8 bits.
    Command: `qvdjax train DIR OUT --recipe efficientdm-w4a4 --data DATA`.
    Published (VBench, mean of eight, Wan 2.1 1.3B W4A4, as QVGen's paper has it): 60.66 against 66.28 in bfloat16.

    Attributes:
        rank: Of the adapters.
        adapter_rate: Learning rate of A and B relative to `--learning-rate`, in units of the layer's mean step size.
        scale_rate: That of step sizes and zero points of weights.
    """

    clip: str = "bins"
    clip_rate: float = 5.0
    rank: int = 32
    adapter_rate: float = 4.0
    scale_rate: float = 0.01

    name = "efficientdm"

    def training(self) -> Training:
        """Learned quantizers around frozen weights."""
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank} and must be at least 1")
        rates = {"adapter_rate": self.adapter_rate, "scale_rate": self.scale_rate}
        return dataclasses.replace(super().training(), adapter_rank=self.rank, **rates)
