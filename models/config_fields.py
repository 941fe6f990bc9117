"""Values of a `config.json`, looked at before anything is built from them."""

import math
from typing import Any

from qvdjax.errors import UserError

# Far above any published model, far below what a damaged file may say and a computer cannot build.
MOST_LAYERS, MOST = 1000, 2**20


def check_field(name: str, value: Any, default: Any) -> None:
    """UserError unless a value is of the kind that the field's default is, and of a credible size."""
    if type(value) is type(default) and value == default:
        return  # also where the default is zero
    most = MOST_LAYERS if name.startswith("num_") and name.endswith("_layers") else MOST

    def whole(number: Any) -> bool:
        return isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= most

    if isinstance(default, bool):
        good, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, kind = whole(value), f"a positive integer of at most {most}"
    elif isinstance(default, float):
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf
        kind = "a positive number"
    elif isinstance(default, tuple):
        good = isinstance(value, (list, tuple)) and len(value) == len(default) and all(map(whole, value))
        kind = f"{len(default)} positive integers of at most {most}"
    else:  # None or a name: what it may be, the configuration itself says
        good, kind = not isinstance(value, int) or whole(value), f"a positive integer of at most {most}"
    if not good:
        shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
        raise UserError(f"config.json: {name} is {shown}", remedy=f"it must be {kind}")
