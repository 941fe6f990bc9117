"""What reading any original layout takes: without the prefixes of ComfyUI, and a configuration from shapes."""

from collections.abc import Mapping
from typing import Any

from qvdjax.errors import UserError

_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def without_prefix(key: str) -> str:
    """An original key without the prefix that ComfyUI puts before it."""
    return next((key.removeprefix(p) for p in _PREFIXES if key.startswith(p)), key)


def shape_of(tensors: Mapping[str, Any], key: str, rank: int, remedy: str) -> tuple[int, ...]:
    """The shape of a tensor that the configuration is read from; UserError where it is missing or has other axes."""
    found = tuple(tensors[key].shape) if key in tensors else ()
    if len(found) != rank or 0 in found:
        raise UserError(
            f"{key} is missing or has not {rank} axes, so the configuration cannot be read from shapes", remedy=remedy
        )
    return found


def check_stated(stated: Mapping[str, Any], by_shape: Mapping[str, Any]) -> None:
    """UserError where the fields of an original configuration are there and not those that shapes tell."""
    wrong = [
        f"{name} {stated[name]}, {value} by shape"
        for name, value in by_shape.items()
        if name in stated and stated[name] != value
    ]
    if wrong:
        remedy = "use the config of this checkpoint"
        raise UserError("config.json contradicts the weights", remedy=remedy, items=wrong)
