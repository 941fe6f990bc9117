"""What reconstruction does with a block: how long, how fast, on what, towards what."""

import dataclasses
from typing import Literal, get_args

from qvdjax.calibration.selection import Selection
from qvdjax.calibration.token_weights import TokenWeights
from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptiveRounding
from qvdjax.ptq.reconstruction.token_estimation import TokenEstimation

Inputs = Literal["full_precision", "propagated"]
Unit = Literal["error", "change"]
Scope = Literal["block", "model"]
Features = Literal["block", "timestep"]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Something about a block's layers is trained until its output is that of the full-precision block: transforms and
    clips of layers that have transforms, the rounding of weights, or estimates of what rounding takes off products.

    The defaults are FlatQuant's published settings (arXiv 2410.09426; ruikangliu/FlatQuant), which S2Q-VDiT's are.

    Attributes:
        epochs: Times that all examples are gone through, in their order.
        iterations: Steps in all, rounded up to whole epochs, in the place of `epochs`; None for those.
        batch: Model inputs in a step. FlatQuant takes 4; the authors of S2Q-VDiT took 1 in later code.
        rate: Of scales, matrices and estimates. clip_rate: Of clips and of steps of weights. Both fall by a cosine to
            `final_rate` times that.
        weight_decay: AdamW's, towards the identity and half-open clips; PyTorch's default, which FlatQuant leaves.
        selection: Which of the calibration set's inputs are examples; None for all of them.
        token_weights: How tokens are weighed; None for all alike.
        inputs: A block meets the "full_precision" blocks' outputs, or those of the quantized blocks before it
            ("propagated"); its target is the full-precision stream in both cases.
        unit: What a step's loss is divided by: "error", its own value, so that its gradient is that of the logarithm
            (FlatQuant's code), or "change", the mean `power` of what the full-precision block changes of the stream, so
            that a penalty beside it weighs alike in all blocks.
        scope: What is trained at a time: each "block", or all blocks of the "model" together, towards the stream that
            the last one gives. A step then holds all blocks, each compiled by itself.
        features: Where the rounding of a UNet's layers of role "temporal_feature" is trained: as part of their "block",
            or before all blocks on the "timestep" alone, towards what each of them gives at every timestep of the
            calibration set (TFMQ-DM's temporal block, arXiv 2311.16503).
        power: Of the differences that the loss takes the mean of (2 nearly everywhere; 2.4 in Q-Diffusion).
        rounding: How the rounding of weights is trained, of every linear layer and convolution whose weight is
            quantized; transforms then stay as they start. None to train transforms and clips instead, with weights
            rounded to nearest codes.
        estimation: How estimates of what rounding takes off products are trained, of every layer that has one, with the
            steps of its weight; transforms then stay as they start. None to train something else.
        temporal: What the loss gives to differences between frames beside those of the stream: gamma of Q-VDiT's
            temporal maintenance distillation (`qvdjax.ptq.reconstruction.temporal`); 0 for nothing.
        memory: GiB of examples that are on the devices at a time, one at least.
    """

    epochs: int = 15
    iterations: int | None = None
    batch: int = 1
    rate: float = 5e-3
    clip_rate: float = 5e-2
    final_rate: float = 1e-3
    weight_decay: float = 0.01
    selection: Selection | None = Selection()
    token_weights: TokenWeights | None = TokenWeights()
    inputs: Inputs = "full_precision"
    unit: Unit = "error"
    scope: Scope = "block"
    features: Features = "block"
    power: float = 2.0
    rounding: AdaptiveRounding | None = None
    estimation: TokenEstimation | None = None
    temporal: float = 0.0
    memory: float = 1.0

    def __post_init__(self):
        kinds = (
            ("inputs", Inputs, "are"), ("unit", Unit, "is"), ("scope", Scope, "is"), ("features", Features, "are"),
        )  # fmt: skip
        for name, kind, verb in kinds:
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {verb} {' or '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.scope == "model" and self.token_weights is not None:
            raise ValueError("token weights are of one block's attentions: leave them out for a whole model")
        if self.epochs < 1 or self.batch < 1 or (self.iterations is not None and self.iterations < 1):
            raise ValueError(
                f"epochs {self.epochs}, iterations {self.iterations} and batch {self.batch} must be at least 1"
            )
        if not self.power >= 1:
            raise ValueError(f"the loss takes differences to a power of at least 1, not {self.power}")
        if not self.temporal >= 0:
            raise ValueError(f"differences between frames weigh at least 0, not {self.temporal}")
        if self.rounding is not None and self.estimation is not None:
            raise ValueError("either roundings are trained or estimates of what rounding takes off")
        if not (self.rate > 0 and self.clip_rate > 0 and self.memory > 0):
            raise ValueError("rates and memory must be positive")

    def epochs_of(self, examples: int) -> int:
        """Times that so many examples are gone through."""
        return self.epochs if self.iterations is None else -(-self.iterations // examples)
