"""mse-*: static ranges of least squared error."""

import dataclasses

from qvdjax.recipes.searched_ranges import SearchedRanges


@dataclasses.dataclass(frozen=True)
class MSE(SearchedRanges):
    """As minmax, with every range, of inputs and of weights, narrowed to the one of least squared error.

    The second baseline of post-training quantization of diffusion models (PTQ4DM, arXiv 2211.15736, compares such
    ranges; QVD's code tree descends from it). An input's range is searched for on every batch of the calibration set;
    both ends are narrowed by one factor, 1 to 0.5.
    Command: `qvdjax quantize DIR OUT --recipe mse-w6a6 --calibration CALIBRATION`.
    Expected: better than minmax where few values are far from the rest; those then clip, which may cost more.
    """

    weight_range: str = "search"

    name = "mse"
