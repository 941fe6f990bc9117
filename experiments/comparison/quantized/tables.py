"""Which rows a bench model's table has."""

import dataclasses
from collections.abc import Mapping

from experiments.comparison.quantized import rows, unet_rows
from experiments.comparison.row import Row


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows, and what is asked about them.

    Attributes:
        rows: By name.
        expected: Rows, each with those that it is expected to be ahead of.
        ablated: Rows that others with their name and a comma leave something out of, or do otherwise.
    """

    rows: Mapping[str, Row]
    expected: tuple[tuple[str, tuple[str, ...]], ...]
    ablated: tuple[str, ...]

    @property
    def ablations(self) -> tuple[tuple[str, str], ...]:
        """Names of these rows, each with that of the row that it is an ablation of."""
        return tuple((name, whole) for whole in self.ablated for name in self.rows if name.startswith(f"{whole},"))


TRANSFORMERS = Table(rows.ROWS, rows.EXPECTED, rows.ABLATED)
UNETS = Table(unet_rows.ROWS, unet_rows.EXPECTED, unet_rows.ABLATED)


def table_of(model: str) -> Table:
    """The table of a bench model by its name, such as "wan-outlier"."""
    return UNETS if model.startswith("animatediff") else TRANSFORMERS
