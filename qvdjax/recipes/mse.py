"""mse-*: static ranges of least squared error."""

import dataclasses

from qvdjax.ptq.range_search import RangeSearch
from qvdjax.recipes.minmax import MinMax


@dataclasses.dataclass(frozen=True)
class MSE(MinMax):
    """As minmax, with every range, of inputs and of weights, narrowed to the one of least squared error.

    The second baseline of post-training quantization of diffusion models (PTQ4DM, arXiv 2211.15736, compares such
    ranges; QVD's code tree descends from it). An input's range is searched for on every batch of the calibration set;
    both ends are narrowed by one factor, 1 to 0.5.
    Command: `qvdjax quantize DIR OUT --recipe mse-w6a6 --calibration CALIBRATION`.
    Expected: better than minmax where few values are far from the rest; those then clip, which may cost more.

    Attributes:
        over_calls: Each call of the calibration set, which is of one video and step, gives a range. The layer's is the
            "widest" of them, which stands for the sources' batches of many samples, or their "mean".
    """

    weight_range: str = "search"
    over_calls: str = "widest"

    name = "mse"

    def range_search(self) -> RangeSearch:
        """Both ends narrowed alike, by squared error."""
        return RangeSearch("shrink", norm=2.0, over_calls=self.over_calls)
