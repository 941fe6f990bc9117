"""What the configurations of several VAEs have in common: fields of any length, refusals, tuples in JSON."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from qvdjax.errors import UserError

_MOST_ENTRIES, _MOST = 64, 2**20


def list_field(*default):
    """A field that JSON has as a list of any length, with these entries by default."""
    return dataclasses.field(default_factory=lambda: default)


class VAEConfig:
    """Checks that every VAE's configuration needs; a subclass is a frozen dataclass."""

    def refuse_others(self, only: Mapping[str, Any]) -> None:
        """UserError unless these fields have the one value that the VAE is written for."""
        for name, value in only.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"config.json: {name} {getattr(self, name)!r} is not supported",
                    remedy=f"use a VAE of this kind that has {value!r}",
                )

    def check_list(self, name: str, kind: type, length: int | None = None) -> None:
        """A field becomes a tuple; UserError unless its entries are true or false (`bool`), positive integers (`int`),
        finite numbers (`float`) or names (`str`), as many as `length` says, at least one where that is None."""
        value = getattr(self, name)
        good = isinstance(value, (list, tuple)) and all(_is(kind, entry) for entry in value)
        good = good and (1 <= len(value) <= _MOST_ENTRIES if length is None else len(value) == length)
        if not good:
            words = {bool: "true or false", int: "positive integers", float: "numbers", str: "names"}[kind]
            shown = repr(value) if len(repr(value)) <= 40 else repr(value)[:40] + "..."
            many = "" if length is None else f"{length} entries, "
            raise UserError(f"config.json: {name} is {shown}", remedy=f"it must be a list: {many}{words}")
        object.__setattr__(self, name, tuple(value))

    def check_levels(self, **only: str) -> None:
        """UserError unless `block_out_channels` and these fields, lists of kinds of blocks that know one kind, have one
        entry a level of resolution; they become tuples."""
        self.check_list("block_out_channels", int)
        for name, kind in only.items():
            self.check_list(name, str, len(self.block_out_channels))
            if other := [entry for entry in getattr(self, name) if entry != kind]:
                raise UserError(f"config.json: {name} has {other[0]!r}", remedy=f"only {kind!r} is known")

    def check_groups(self) -> None:
        """UserError unless `norm_num_groups` divides the channels of every level."""
        for width in self.block_out_channels:
            if width % self.norm_num_groups:
                raise UserError(
                    f"config.json: norm_num_groups {self.norm_num_groups} does not divide {width} channels",
                    remedy="choose a divisor",
                )

    def fields_for_json(self, class_name: str) -> dict[str, Any]:
        """The fields as `config.json` holds them, tuples as lists."""
        fields = {name: [*v] if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {"_class_name": class_name, **fields}


def _is(kind: type, entry: Any) -> bool:
    if kind is bool or kind is str:
        return isinstance(entry, kind)
    if isinstance(entry, bool):
        return False
    if kind is int:
        return isinstance(entry, int) and 1 <= entry <= _MOST
    return isinstance(entry, (int, float)) and math.isfinite(entry)
