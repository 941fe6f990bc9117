"""flatquant-*: learned affine transforms and clips, block by block."""

import dataclasses

from qvdjax.calibration.selection import Selection
from qvdjax.nn import InputClip, Kronecker, LowRank
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.reconstruction import Reconstruction
from qvdjax.ptq.transforms import FitChannelScale, FitProduct
from qvdjax.recipes.method import FLOAT_ACTIVATION_BITS, Method


@dataclasses.dataclass(frozen=True)
class FlatQuant(Method):
    """A learned scale and Kronecker matrix on each input, learned clips, then GPTQ (arXiv 2410.09426).

    Each block is trained to give what the full-precision block gives. Settings are those of the release
    (ruikangliu/FlatQuant).

    Left open by the source, which quantizes language models, and chosen here: each layer has transforms of its own,
    also query, key and value, which share an input, so these cost three times what one would; the scale and the
    matrices' singular values are trained as logarithms; `samples` random steps of the calibration set, with both
    guidance branches, are what is trained on, and what ranges and GPTQ's second moments are taken of.
    Command: `qvdjax quantize DIR OUT --recipe flatquant-w4a4 --calibration CALIBRATION`.
    Expected: better than quarot and gptq at 4 bits, for minutes to hours of training. Published: none for video models.

    Attributes:
        samples: Steps that are trained on, each with the prompt and with the negative prompt.
        epochs, batch: Of each block's training.
        rate: Learning rate of scales and matrices. clip_rate: Of clips.
        alpha: Where the scale starts: 0 at one, 1 at the inputs' ranges.
        kronecker_left: Size of the first Kronecker factor; none for the divisor nearest below the width's square root.
        inputs: "full_precision", or "propagated" through the quantized blocks before.
        gptq: Round weights as `gptq-*` does; false for the nearest codes.
        rounded_inputs: Fit weights to inputs as they are rounded before that (see `gptq-*`).
        rank: Of a branch in full precision beside every product, as SVDQuant has it; 0, as published, for none.
        narrow_below: Layers whose smaller side is below this have branches of `narrow_rank`; 0 for none.
        narrow_rank: Of these.
        seed: Of matrices and samples.
    """

    samples: int = 40
    epochs: int = 15
    batch: int = 4
    rate: float = 5e-3
    clip_rate: float = 5e-2
    alpha: float = 0.3
    kronecker_left: int | None = None
    inputs: str = "full_precision"
    gptq: bool = True
    rounded_inputs: bool = False
    rank: int = 0
    narrow_below: int = 0
    narrow_rank: int = 8
    seed: int = 0

    name = "flatquant"

    def transform(self) -> FitProduct:
        """Where transforms start."""
        return FitProduct(FitChannelScale(self.alpha), kronecker=Kronecker(self.kronecker_left), seed=self.seed)

    def input_clip(self) -> InputClip | None:
        """One learned factor a layer."""
        return None if self.activation_bits == FLOAT_ACTIVATION_BITS else InputClip(ratio=1.0)

    def low_rank(self) -> LowRank | None:
        """The branch, where one is asked for."""
        return LowRank(self.rank, self.narrow_below, self.narrow_rank) if self.rank else None

    def rounding(self) -> ErrorCompensation | None:
        """GPTQ's."""
        return ErrorCompensation(rounded_inputs=self.rounded_inputs) if self.gptq else None

    def reconstruction(self) -> Reconstruction:
        """The training of blocks."""
        return Reconstruction(
            epochs=self.epochs, batch=self.batch, rate=self.rate, clip_rate=self.clip_rate, inputs=self.inputs,
            selection=Selection(self.samples, "random", seed=self.seed), token_weights=None,
        )  # fmt: skip
