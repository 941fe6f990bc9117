"""The families of models that are known, by the class name in diffusers' `config.json`."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from models.cogvideox import CogVideoXModel
from models.cogvideox_config import CogVideoXConfig
from models.config_fields import check_field
from models.hunyuanvideo import HunyuanVideoModel
from models.hunyuanvideo_config import HunyuanVideoConfig
from models.unet_3d import UNet3DConditionModel
from models.unet_3d_config import UNet3DConfig
from models.unet_motion import UNetMotionModel
from models.unet_motion_config import UNetMotionConfig
from models.unet_spatio_temporal import UNetSpatioTemporalConditionModel
from models.unet_spatio_temporal_config import UNetSpatioTemporalConfig
from models.wan import WanConfig, WanModel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture: its short name, its configuration and its module.

    `unused` are ends of names of tensors that published folders hold and that no program computes with.
    """

    name: str
    config: type
    model: type[VideoModel]
    unused: tuple[str, ...] = ()


FAMILIES = {
    "CogVideoXTransformer3DModel": Family("cogvideox", CogVideoXConfig, CogVideoXModel),
    "HunyuanVideoTransformer3DModel": Family("hunyuanvideo", HunyuanVideoConfig, HunyuanVideoModel),
    "UNet3DConditionModel": Family("modelscope", UNet3DConfig, UNet3DConditionModel),
    "UNetMotionModel": Family("animatediff", UNetMotionConfig, UNetMotionModel),
    "UNetSpatioTemporalConditionModel": Family(
        "stable-video-diffusion", UNetSpatioTemporalConfig, UNetSpatioTemporalConditionModel
    ),
    # An older version of diffusers wrote them; today's leaves them aside (`_keys_to_ignore_on_load_unexpected`).
    "WanTransformer3DModel": Family("wan", WanConfig, WanModel, unused=("norm_added_q.weight",)),
}


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
        UserError: An unknown architecture or field, or a value of the wrong kind or of an absurd size.
    """
    family = family_of(config)
    return parse_fields(config, family.config, family.name)


def parse_fields(config: dict[str, Any], kind: type, name: str):
    """A configuration of a `kind` from the fields of `config.json`, as `parse_config` makes one; `name` is what it
    describes, for the message.

    Raises:
        UserError: An unknown field, or a value of the wrong kind or of an absurd size.
    """
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    known = {field.name: field for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - set(known)):
        raise UserError("config.json has fields that this architecture does not", remedy="remove them", items=unknown)
    for field, value in fields.items():
        check_field(field, value, known[field].default)
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json does not describe a {name} model ({error})", remedy="mend it") from error


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
