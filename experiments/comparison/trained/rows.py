"""What is compared: recipes by the name of their row in the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvdjax import recipes
from qvdjax.recipes import Recipe

RANK = 8  # of Phi and adapters: the bench's layers are 128 wide, where 32 directions would be a quarter of a weight


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method: Its recipe without the bits.
        options: Of the method, where they are not its defaults.
        note: What the row is there for.
    """

    method: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def recipe(self, bits: str) -> Recipe:
        """At some bits, such as "w4a4"."""
        return recipes.get(f"{self.method}-{bits}", **self.options)


_PHI = {"rank": RANK}
ROWS = {
    "straight-through": Row("rtn", note="ranges follow the values"),
    "LSQ": Row("lsq"),
    "Q-DM": Row("q-dm"),
    "EfficientDM": Row("efficientdm", {"rank": RANK}),
    "QVGen, Phi kept": Row("qvgen", {**_PHI, "phases": "keep"}, "an ablation: its model cannot be stored"),
    "QVGen, single decay": Row("qvgen", {**_PHI, "phases": "single"}),
    "QVGen": Row("qvgen", _PHI),
    "QVGen without Phi": Row("qvgen", {"rank": 0}, "the same clips and rates"),
    "DSAQuant": Row("dsaquant"),
    "QVGen, DSAQuant's loss": Row("qvgen", {**_PHI, "target": "fading"}, "the two together"),
}
