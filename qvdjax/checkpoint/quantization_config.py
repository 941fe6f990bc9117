"""`quantization_config` of config.json: what every layer became, in compressed-tensors' vocabulary and in full.

`config_groups` and `ignore` say it as compressed-tensors does (num_bits, type, symmetric, strategy, group_size,
dynamic; targets by layer name), which is enough for plain layers; it has no words for tables over timesteps, and names
them nowhere. The `qvdjax` part holds the schemes themselves, with transforms and reasons, and is what this project
reads.
"""

from collections.abc import Mapping
from typing import Any

from qvdjax.errors import UserError
from qvdjax.nn import AttentionScheme, LayerScheme, TableScheme, VideoModel, layers_of
from qvdjax.nn.layers import FLOAT_LAYERS, QUANTIZED_LAYERS, TABLE_LAYERS
from qvdjax.numerics import Quantizer

VERSION = 1
Scheme = LayerScheme | AttentionScheme | TableScheme


def schemes_of(model: VideoModel) -> dict[str, Scheme]:
    """Name in diffusers -> scheme, for every layer of a quantized model or one with tables."""
    layers = layers_of(model, (*FLOAT_LAYERS, *QUANTIZED_LAYERS, *TABLE_LAYERS))
    return {name: layer.scheme for names, _, layer in layers for name in names}


def to_config(schemes: Mapping[str, Scheme], recipe: str) -> dict[str, Any]:
    """The value of `quantization_config`."""
    kinds = list(dict.fromkeys(schemes.values()))
    products = {name: scheme for name, scheme in schemes.items() if isinstance(scheme, LayerScheme)}
    groups = {}
    for kind in kinds:
        if isinstance(kind, LayerScheme) and kind.quantizes:
            targets = [name for name, scheme in products.items() if scheme == kind]
            groups[f"group_{len(groups)}"] = {
                "targets": targets,
                "weights": quantization_args(kind.weight),
                "input_activations": quantization_args(kind.activation),
            }
    return {
        "quant_method": "qvdjax",
        "config_groups": groups,
        "ignore": [name for name, scheme in products.items() if not scheme.quantizes],
        "qvdjax": {
            "version": VERSION,
            "recipe": recipe,
            "schemes": [{"kind": _KINDS[type(kind)], **kind.to_dict()} for kind in kinds],
            "layers": {name: kinds.index(scheme) for name, scheme in schemes.items()},
        },
    }


def quantization_args(quantizer: Quantizer | None) -> dict[str, Any] | None:
    """A quantizer as compressed-tensors' QuantizationArgs; None for floats."""
    if quantizer is None:
        return None
    return {
        "num_bits": quantizer.bits, "type": "float" if quantizer.grid.floating else "int",
        "symmetric": quantizer.symmetric, "strategy": quantizer.granularity, "group_size": quantizer.group_size,
        "dynamic": quantizer.dynamic,
    }  # fmt: skip


_KINDS = {LayerScheme: "layer", AttentionScheme: "attention", TableScheme: "table"}
_READERS = {
    "layer": LayerScheme.from_dict, "attention": lambda fields: AttentionScheme(**fields),
    "table": TableScheme.from_dict,
}  # fmt: skip


def from_config(config: Mapping[str, Any], where: str) -> tuple[dict[str, Scheme], str]:
    """Schemes by layer and the recipe's name; inverse of `to_config`.

    Args:
        config: The value of `quantization_config`.
        where: File, for messages.

    Raises:
        UserError: Another tool's quantization, a newer version, or an entry that makes no sense.
    """
    part = config.get("qvdjax") if isinstance(config, Mapping) else None
    if not isinstance(part, Mapping):
        method = config.get("quant_method") if isinstance(config, Mapping) else config
        raise UserError(
            f"{where}: quantization_config is {method!r}, not qvdjax's",
            remedy="start from the full-precision checkpoint",
        )
    if part.get("version") != VERSION:
        raise UserError(
            f"{where}: quantization_config has version {part.get('version')!r}, this program reads {VERSION}",
            remedy="use the version that wrote it",
        )
    try:
        kinds = [_READERS[entry["kind"]]({k: v for k, v in entry.items() if k != "kind"}) for entry in part["schemes"]]
        schemes = {name: kinds[number] for name, number in part["layers"].items() if number >= 0}
        if len(schemes) != len(part["layers"]):
            raise ValueError("negative scheme number")
        return schemes, str(part["recipe"])
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: quantization_config cannot be understood ({type(error).__name__}: {error})",
            remedy="quantize the model again",
        ) from error
