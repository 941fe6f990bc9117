"""Encoders of texts and images, as pipelines of published models hold them, read without PyTorch.

transformers' folder has `config.json` and `model.safetensors`, or shards and their index. One that was quantized here
has diffusers' file names, as every model folder of ours.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.clip_text import CLIPTextConfig, CLIPTextEncoder
from models.clip_vision import CLIPVisionConfig, CLIPVisionEncoder
from models.config_fields import check_field
from models.folders import abstract_model
from models.text_llama import LlamaConfig, LlamaEncoder
from models.text_t5 import T5Config, T5Encoder, UMT5Config
from qvdjax.checkpoint import CheckpointFolder, Progress, load_variables, loaded_shapes
from qvdjax.checkpoint.folder import STEM
from qvdjax.checkpoint.header import TensorInfo
from qvdjax.errors import UserError
from qvdjax.nn import Execution
from qvdjax.parallel import shardings

TRANSFORMERS_STEM = "model"


def _t5_name(name: str) -> str | None:
    if name == "encoder.embed_tokens.weight":  # the same array as shared.weight; some programs write the one or both
        return "shared.weight"
    return None if name.startswith(("decoder.", "lm_head.")) else name


def _llama_name(name: str) -> str | None:
    if name.startswith("lm_head.") or name.endswith(".rotary_emb.inv_freq"):  # the latter in files of older versions
        return None
    return name.removeprefix("model.")  # where a language model's head was beside it


def _clip_name(name: str, prefix: str) -> str | None:
    if name.endswith(".position_ids"):  # 0, 1, 2, ..., in files of older versions
        return None
    # Newer versions of transformers leave the prefix out where there is no projection beside the model.
    return name if name.startswith((f"{prefix}.", "text_projection.", "visual_projection.")) else f"{prefix}.{name}"


@dataclasses.dataclass(frozen=True)
class EncoderKind:
    """One architecture: its configuration, its module, and what a tensor of a file is called here.

    `name_of` gives None for a tensor that the encoder does without.
    """

    config: type
    model: type[nnx.Module]
    name_of: Callable[[str], str | None]


# By transformers' `model_type`.
ENCODERS = {
    "t5": EncoderKind(T5Config, T5Encoder, _t5_name),
    "clip_text_model": EncoderKind(CLIPTextConfig, CLIPTextEncoder, functools.partial(_clip_name, prefix="text_model")),
    "clip_vision_model": EncoderKind(
        CLIPVisionConfig, CLIPVisionEncoder, functools.partial(_clip_name, prefix="vision_model")
    ),
    "llama": EncoderKind(LlamaConfig, LlamaEncoder, _llama_name),
    "umt5": EncoderKind(UMT5Config, T5Encoder, _t5_name),
}


def encoder_kind(config: Mapping[str, Any]) -> EncoderKind:
    """The kind that a `config.json` names; UserError when it names none that is known."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ENCODERS:
        raise UserError(
            f"config.json names the encoder {name!r}, which is not known", remedy=f"known: {', '.join(ENCODERS)}"
        )
    return ENCODERS[name]


def parse_encoder_config(config: Mapping[str, Any]):
    """The encoder's configuration from the fields of `config.json`.

    transformers writes many fields that say nothing about an encoder; they are left aside.

    Raises:
        UserError: An unknown architecture, or a value of the wrong kind or of an absurd size.
    """
    kind = encoder_kind(config)
    known = {field.name: field.default for field in dataclasses.fields(kind.config)}
    fields = {name: config[name] for name in known if name in config}
    for name, value in fields.items():
        check_field(name, value, known[name])
    return kind.config(**fields)


def build_encoder(config: Mapping[str, Any], *, key: jax.Array | None = None, dtype=jnp.float32) -> nnx.Module:
    """A freshly initialised encoder; under `jax.eval_shape` it takes no memory."""
    key = jax.random.key(0) if key is None else key
    return encoder_kind(config).model(parse_encoder_config(config), key=key, dtype=dtype)


@dataclasses.dataclass(frozen=True)
class EncoderFolder(CheckpointFolder):
    """The checked table of contents of an encoder's folder.

    Attributes:
        names: Name here -> name in the file, of the tensors that the encoder needs.
    """

    names: Mapping[str, str]

    @classmethod
    def open(cls, path: str | os.PathLike) -> Self:
        """Read config, index and headers.

        Raises:
            UserError: See `CheckpointFolder.open`; an unknown encoder; two tensors that should be one and differ.
        """
        path = Path(path)
        ours = path.is_dir() and any(path.glob(f"{STEM}*.safetensors"))
        folder = CheckpointFolder.open(path, stem=STEM if ours else TRANSFORMERS_STEM)
        name_of = encoder_kind(folder.config).name_of
        names: dict[str, str] = {}
        for stored in folder.files:
            name = name_of(stored)
            if name in names and not _alike(folder, names[name], stored):
                raise UserError(
                    f"{path} holds {names[name]} and {stored}, which are one tensor and differ",
                    remedy="download the folder again",
                )
            if name is not None:
                names.setdefault(name, stored)
        return cls(folder.path, folder.config, folder.files, names)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names here of all tensors that are needed."""
        return tuple(self.names)

    def info(self, key: str) -> TensorInfo:
        """Shape and type of one tensor."""
        return super().info(self.names.get(key, key))

    def read(self, key: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor or a part of it; see `SafetensorsFile.read`."""
        return super().read(self.names.get(key, key), index)


def _alike(folder: CheckpointFolder, one: str, other: str, rows: int = 4096) -> bool:
    """Whether two tensors of a file hold the same, compared some rows at a time."""
    shape = folder.info(one).shape
    if not shape or shape != folder.info(other).shape:
        return False
    parts = (slice(start, start + rows) for start in range(0, shape[0], rows))
    return all(np.array_equal(folder.read(one, (part,)), folder.read(other, (part,))) for part in parts)


def encoder_shapes(path: str | os.PathLike, *, dtype: Any = None) -> nnx.Module:
    """The encoder as shapes and types, as `load_encoder` will read it; no weight is read.

    Args:
        path: Its folder.
        dtype: Floating type asked for; the file's by default.
    """
    folder = EncoderFolder.open(path)
    dtype = None if dtype is None else jnp.dtype(dtype)
    return loaded_shapes(abstract_model(folder, None, build=build_encoder), folder, dtype=dtype)


def load_encoder(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> nnx.Module:
    """Read an encoder's folder, transformers' or quantized here; arguments and errors are those of `models.load`,
    whose inverse `models.save` is the inverse of this too."""
    folder = EncoderFolder.open(path)
    abstract = abstract_model(folder, execution, build=build_encoder)
    where = None if mesh is None else shardings(abstract, mesh)
    dtype = None if dtype is None else jnp.dtype(dtype)
    return load_variables(abstract, folder, dtype=dtype, shardings=where, progress=progress)
