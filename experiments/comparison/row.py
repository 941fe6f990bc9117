"""One line of a comparison's table."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvdjax import recipes
from qvdjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe, and what it is there for.

    Attributes:
        method: Its recipe without the bits.
        options: Of the method, where they are not its defaults.
        note: What the row is there for.
    """

    method: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""

    def recipe(self, bits: str, seed: int | None = None) -> Recipe:
        """At some bits, such as "w4a4"; a seed is the method's where it has one."""
        fields = {field.name for field in dataclasses.fields(recipes.METHODS[self.method])}
        seeded = {"seed": seed} if seed is not None and "seed" in fields else {}
        return recipes.get(f"{self.method}-{bits}", **seeded, **self.options)
