"""q-dm-*: learned step sizes and ranges that know the timestep, trained towards the teacher."""

import dataclasses

from qvdjax.recipes.learned import Learned


@dataclasses.dataclass(frozen=True)
class QDM(Learned):
    """Q-DM (Li et al., NeurIPS 2023): noise-estimation mimicking, and activations normalised by timestep.

    Mimicking is the loss: the squared distance to the full-precision model's prediction from the same noisy latents.
    Left open by the source for video DiTs, and chosen here: the normalisation by timestep is a learned clip of each
    token's range, a pair for each of 50 bins of the timestep; step sizes of weights are LSQ's.
    Command: `qvdjax train DIR OUT --recipe q-dm-w4a4 --data DATA`.
    Published (VBench, mean of eight, Wan 2.1 1.3B W4A4, as QVGen's paper has it): 63.04 against 66.28 in bfloat16.
    """

    clip: str = "bins"

    name = "q-dm"
