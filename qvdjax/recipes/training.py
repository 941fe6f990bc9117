"""How a recipe is trained: what it has beside rules, as data. The loop that reads it knows no method by name."""

import dataclasses
from typing import Literal, get_args

Target = Literal["teacher", "data", "fading"]


@dataclasses.dataclass(frozen=True)
class Auxiliary:
    """A low-rank module beside every rounded weight, and how it goes away (see `qvdjax.qat.RankDecay`).

    Attributes:
        rank: Directions at the start.
        start: "svd" of what rounding leaves, "zeros" or "random".
        phases, keep, shape, warm_up: Of the decay; phases "keep" leaves the module in the model, an ablation.
        second_moments: Of the optimizer at a phase's start: "follow" the change of basis, or "reset".
    """

    rank: int = 32
    start: str = "svd"
    phases: str = "paper"
    keep: float = 0.5
    shape: str = "cosine"
    warm_up: int = 0
    second_moments: str = "follow"


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run takes from its recipe, whose quantizers are trained with the weights.

    Learned are weights' scales, zero points of asymmetric grids, and the clips of inputs.

    Attributes:
        start: Where learned scales begin: "search", "minmax" or "mean" (`qvdjax.qat.learned_weights.start`).
        scaled_gradients: LSQ's gradient scale.
        target: What the loss follows: the teacher's velocity, the data's own, or the teacher's at much noise fading
            into the data's at little.
        fading: Of the last: the teacher's share at noise level s is (e^(fading s) - 1) / (e^fading - 1).
        clip_rate: Learning rate of clip logits relative to the weights'.
        scale_rate: That of weights' step sizes and zero points.
        auxiliary: A module that lowers the gradients' norm while training, or None.
        adapter_rank: 0 trains all of the model. Otherwise only its quantizers are trained, and adapters of this rank
            inside those of weights (`qvdjax.qat.adapter`).
        adapter_rate: That of adapters.
    """

    start: str = "search"
    scaled_gradients: bool = True
    target: Target = "teacher"
    fading: float = 5.0
    clip_rate: float = 1.0
    scale_rate: float = 1.0
    auxiliary: Auxiliary | None = None
    adapter_rank: int = 0
    adapter_rate: float = 1.0

    def __post_init__(self):
        if self.target not in get_args(Target):
            raise ValueError(f"{self.target!r} is none of {', '.join(get_args(Target))}")
        if not self.fading > 0:
            raise ValueError(f"fading is {self.fading} and must be positive")
