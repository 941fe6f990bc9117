"""The families of models that are known, by the class name in diffusers' `config.json`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.wan import WanConfig, WanModel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its short name, its configuration and its module."""

    name: str
    config: type
    model: type[VideoModel]


FAMILIES = {"WanTransformer3DModel": Family("wan", WanConfig, WanModel)}


def family_of(config: dict[str, Any]) -> Family:
    """The family that `config.json` names; UserError when it names none that is known."""
    name = config.get("_class_name")
    if name not in FAMILIES:
        raise UserError(
            f"config.json names the architecture {name!r}, which is not known", remedy=f"known: {', '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def parse_config(config: dict[str, Any]):
    """The family's configuration from the fields of `config.json`; private and quantization fields are left aside.

    Raises:
        UserError: An unknown architecture or field, or a value of the wrong kind.
    """
    family = family_of(config)
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    known = {field.name: field for field in dataclasses.fields(family.config)}
    if unknown := sorted(set(fields) - set(known)):
        raise UserError("config.json has fields that this architecture does not", remedy="remove them", items=unknown)
    for name, value in fields.items():
        default = known[name].default
        number = isinstance(default, int) and not isinstance(default, bool)
        if number and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise UserError(f"config.json: {name} is {value!r}", remedy="it must be a positive integer")
    try:
        return family.config(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a {family.name} model ({error})", remedy="mend it") from error


def build(config: dict[str, Any], *, key: jax.Array | None = None, dtype=jnp.float32) -> VideoModel:
    """A freshly initialised model; under `jax.eval_shape` it takes no memory.

    Args:
        config: Fields of `config.json`.
        key: For the initial weights, `jax.random.key(0)` by default.
        dtype: Of all parameters.
    """
    key = jax.random.key(0) if key is None else key
    return family_of(config).model(parse_config(config), key=key, dtype=dtype)


def abstract(config: dict[str, Any], dtype=jnp.float32) -> VideoModel:
    """The model as shapes and dtypes, without memory."""
    return jax.eval_shape(lambda: build(config, dtype=dtype))
