"""What reconstruction does with a block: how long, how fast, on what, towards what."""

import dataclasses
from typing import Literal, get_args

from qvdjax.calibration.selection import Selection
from qvdjax.calibration.token_weights import TokenWeights

Inputs = Literal["full_precision", "propagated"]


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Transforms and clips of a block's layers are trained until its output is that of the full-precision block.

    The defaults are FlatQuant's published settings (arXiv 2410.09426; ruikangliu/FlatQuant), which S2Q-VDiT's are.

    Attributes:
        epochs: Times that all examples are gone through, in their order.
        batch: Model inputs in a step. FlatQuant takes 4; the authors of S2Q-VDiT took 1 in later code.
        rate: Of scales and matrices. clip_rate: Of clips. Both fall by a cosine to `final_rate` times that.
        weight_decay: AdamW's, towards the identity and half-open clips; PyTorch's default, which FlatQuant leaves.
        selection: Which of the calibration set's inputs are examples; None for all of them.
        token_weights: How tokens are weighed; None for all alike.
        inputs: A block meets the "full_precision" blocks' outputs, or those of the quantized blocks before it
            ("propagated"); its target is the full-precision stream in both cases.
        relative: Each step's loss is divided by its own value, so that its gradient is that of the logarithm
            (FlatQuant's code).
        memory: GiB of examples that are on the devices at a time, one at least.
    """

    epochs: int = 15
    batch: int = 1
    rate: float = 5e-3
    clip_rate: float = 5e-2
    final_rate: float = 1e-3
    weight_decay: float = 0.01
    selection: Selection | None = Selection()
    token_weights: TokenWeights | None = TokenWeights()
    inputs: Inputs = "full_precision"
    relative: bool = True
    memory: float = 1.0

    def __post_init__(self):
        if self.inputs not in get_args(Inputs):
            raise ValueError(f"inputs are {' or '.join(get_args(Inputs))}, not {self.inputs!r}")
        if self.epochs < 1 or self.batch < 1:
            raise ValueError(f"epochs {self.epochs} and batch {self.batch} must be at least 1")
        if not (self.rate > 0 and self.clip_rate > 0 and self.memory > 0):
            raise ValueError("rates and memory must be positive")
