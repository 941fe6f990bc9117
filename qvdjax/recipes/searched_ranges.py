"""What methods whose static ranges are narrowed by search have in common."""

import dataclasses

from qvdjax.ptq.range_search import RangeSearch
from qvdjax.recipes.minmax import MinMax


@dataclasses.dataclass(frozen=True)
class SearchedRanges(MinMax):
    """minmax, with both ends of an input's range narrowed alike.

    Attributes:
        over_calls: Each call of the calibration set, which is of one video and step, gives a range. The layer's, or a
            timestep's, is the "widest" of them, which stands for the sources' batches of many samples, or their "mean".
        error_norm: Of what narrowing does to the input; a class's, no option.
    """

    over_calls: str = "widest"

    error_norm = 2.0

    def range_search(self) -> RangeSearch:
        """Both ends narrowed alike, by the class's norm of the error."""
        return RangeSearch("shrink", norm=self.error_norm, over_calls=self.over_calls)
