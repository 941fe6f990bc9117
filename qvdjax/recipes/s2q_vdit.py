"""s2q-vdit-*: salient calibration data, and tokens weighed by the attention they get."""

import dataclasses

from qvdjax.calibration.selection import Selection
from qvdjax.calibration.token_weights import TokenWeights
from qvdjax.ptq.reconstruction import Reconstruction
from qvdjax.recipes.flatquant import FlatQuant


@dataclasses.dataclass(frozen=True)
class S2QVDiT(FlatQuant):
    """flatquant on selected samples, with a loss that follows attention (Feng et al., NeurIPS 2025, arXiv 2508.04016).

    Hessian-aware salient data selection: `samples` steps of the calibration set with the largest product of how much a
    step changes and how large the Hessian of its input is (equations 3, 6 to 8). Attention-guided sparse token
    distillation: each token's error in a block's output weighs by the attention that the token gets, from
    `least_weight` to 1 (equations 10, 11). Everything else is FlatQuant's, whose learned matrix the paper names.

    The paper's code was never published. Left open, and chosen here: see `Selection` for the data; both guidance
    branches of a selected step are trained on; weights are made anew for each block by its full-precision attentions
    over the stream (cross-attention has other keys); text tokens of joint attention count; 40 samples, as in the main
    text (the appendix says 30); batches of one, as in later code of the first author.
    Command: `qvdjax quantize DIR OUT --recipe s2q-vdit-w4a6`.
    Published, VBench imaging quality, scene consistency and overall consistency: CogVideoX-2B W4A6 55.49, 32.70, 25.19
    (58.69, 33.79, 25.91 in full precision); W4A4 52.95, 32.75, 24.84 over three seeds.

    Attributes:
        select: "product" as published, "difference", "quantization", "random", "prompts" or "diverse".
        norm: Of the Hessian, "frobenius" or "spectral".
        least_weight: lambda_min of the tokens; 1 weighs all alike.
        token_weights: "minmax" as published, "percentile" or "none".
        text_tokens: Whether text tokens of the stream count.
    """

    batch: int = 1
    select: str = "product"
    norm: str = "frobenius"
    least_weight: float = 0.5
    token_weights: str = "minmax"
    text_tokens: bool = True

    name = "s2q-vdit"

    def reconstruction(self) -> Reconstruction:
        """FlatQuant's, on other samples with another loss."""
        weights = None
        if self.token_weights != "none":
            weights = TokenWeights(self.token_weights, self.least_weight, self.text_tokens)
        selection = Selection(self.samples, self.select, self.norm, self.seed)
        return dataclasses.replace(super().reconstruction(), selection=selection, token_weights=weights)
