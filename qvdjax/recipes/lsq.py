"""lsq-*: learned step sizes, trained on the data's own target."""

import dataclasses

from qvdjax.recipes.learned import Learned


@dataclasses.dataclass(frozen=True)
class LearnedStepSize(Learned):
    """Learned step sizes of weights (Esser et al., ICLR 2020, arXiv 1902.08153), input ranges a token as they come.

    The loss is the task's: the data's velocity, no teacher. With `weight_symmetric=false` the zero point is learned too
    (LSQ+, arXiv 2004.09576). Left open by the source, and chosen here: inputs of a video DiT take dynamic ranges, as
    every method of this library does, where the paper learns one step size a layer; step sizes start by search.
    Command: `qvdjax train DIR OUT --recipe lsq-w4a4 --data DATA`.
    Published (VBench, mean of eight, Wan 2.1 1.3B W4A4, as QVGen's paper has it): 61.40 against 66.28 in bfloat16.
    """

    target: str = "data"

    name = "lsq"
