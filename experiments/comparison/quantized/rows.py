"""What is compared: recipes by the name of their row in the table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvdjax import recipes
from qvdjax.recipes import Recipe


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

    def recipe(self, bits: str, seed: int) -> Recipe:
        """At some bits, such as "w4a4"; the seed is the method's where it has one."""
        fields = {field.name for field in dataclasses.fields(recipes.METHODS[self.method])}
        seeded = {"seed": seed} if "seed" in fields else {}
        return recipes.get(f"{self.method}-{bits}", **seeded, **self.options)


ROWS = {
    "RTN": Row("rtn"),
    "SmoothQuant": Row("smoothquant"),
    "QuaRot": Row("quarot"),
    "ViDiT-Q": Row("vidit-q"),
    "GPTQ": Row("gptq"),
    "GPTQ, rotated": Row("gptq", {"rotation": True}, "the rotation of QuaRot before it"),
    "SVDQuant": Row("svdquant", {"rank": 8}, "rank 8: the bench's layers are 128 wide"),
    "Q-DiT": Row("q-dit", {"group_size": 64, "activation_group_size": 64}, "groups of 64 channels"),
    "DVD-Quant": Row("dvd-quant", {"activation_group_size": 64}, "groups of 64 channels, the same bits at all steps"),
    "OrbitQuant": Row("orbitquant"),
    "FlatQuant": Row("flatquant"),
    "S2Q-VDiT": Row("s2q-vdit"),
    "S2Q-VDiT, random samples": Row("s2q-vdit", {"select": "random"}, "an ablation of the selection"),
    "S2Q-VDiT, tokens alike": Row("s2q-vdit", {"token_weights": "none"}, "an ablation of the token weights"),
    "S2Q-VDiT, percentiles": Row("s2q-vdit", {"token_weights": "percentile"}, "token weights by rank"),
    "S2Q-VDiT, propagated": Row("s2q-vdit", {"inputs": "propagated"}, "blocks meet the errors of those before"),
}
