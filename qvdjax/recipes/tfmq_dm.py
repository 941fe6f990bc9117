"""tfmq-dm-*: a static range for each timestep, and rounding learned, of temporal layers on the timestep alone."""

import dataclasses

from qvdjax.numerics import Quantizer
from qvdjax.recipes.learned_rounding import LearnedRounding
from qvdjax.recipes.searched_ranges import SearchedRanges


@dataclasses.dataclass(frozen=True)
class TFMQDM(LearnedRounding, SearchedRanges):
    """Static ranges of each timestep, and a temporal block of its own (Huang et al., CVPR 2024, arXiv 2311.16503;
    2407.19547; ModelTC/TFMQ-DM at d551eac).

    Finite-set calibration: a sampler has finitely many timesteps, so the range of every input is calibrated at each and
    held in a table; temporal features, one vector a step, have a range a step by nature. A call at a timestep that was
    not calibrated takes the ranges of the nearest. `qvdjax tabulate OUT TABLES --steps STEPS` then stores what the
    layers of the timestep give, which is the cache of the later paper and leaves nothing of them to round.
    Temporal information aware reconstruction (TIAR): the layers that add the timestep to the ResNets are one block,
    whose rounding is learned on the timesteps alone, before that of all other blocks and apart from it
    (`features=timestep`). The other blocks follow as `adaround` says; `learn=false` rounds all to the nearest codes.
    Left open or not followed, and chosen here: ranges are narrowed by the 2.4-norm and not trained; the layers that
    make the time embedding, in the source part of the temporal block, stay float as in every recipe; 2,000 steps a
    block at a rate of 1e-2, where the release has 20,000.
    Command: `qvdjax quantize DIR OUT --recipe tfmq-dm-w8a8 --calibration CALIBRATION`, calibrated with the steps that
    will be sampled with.
    Expected: ahead of mse where ranges change much while sampling. Published: none for video models by itself.
    """

    activation_symmetric: bool = False
    temporal_features: str = "step"

    name = "tfmq-dm"
    error_norm = 2.4

    def activation(self) -> Quantizer | None:
        """Static, one range a timestep."""
        tensor = super().activation()
        return tensor and dataclasses.replace(tensor, granularity="step")
