"""Where a tensor of diffusers lies in a checkpoint of another layout."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Place:
    """Some rows of a tensor, or all of it.

    Attributes:
        key: The tensor's name there.
        rows: Stretches (start, stop) of its first axis, in the order in which diffusers has them; None for all.
    """

    key: str
    rows: tuple[tuple[int, int], ...] | None = None
