"""What a folder may hold beside a video model: an encoder of texts or images, or a VAE."""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
from flax import nnx

from models.encoders import ENCODERS, EncoderFolder, build_encoder, load_encoder
from models.folders import abstract_model
from models.vae_folders import VAES, abstract_vae, load_vae, open_vae_folder
from qvdjax.checkpoint import CheckpointFolder, Progress
from qvdjax.checkpoint.folder import CONFIG, read_json


@dataclasses.dataclass(frozen=True)
class Component:
    """One that is there.

    Attributes:
        kind: What it is, for people.
        architecture: Its name in `config.json`.
        folder: Its table of contents.
        abstract: The module without its arrays, quantized layers in place.
        load: load(mesh=None, progress=None) reads it; a VAE lies whole on every device of a mesh.
    """

    kind: Literal["encoder", "VAE"]
    architecture: str
    folder: CheckpointFolder
    abstract: nnx.Module
    load: Callable[..., nnx.Module]


def component_of(path: str | os.PathLike) -> Component | None:
    """The encoder or VAE that a folder holds; None for everything else, a folder that is not there among it.

    Raises:
        UserError: Its files are not in order, see `load_encoder` and `load_vae`.
    """
    config = Path(path) / CONFIG
    fields = read_json(config) if config.is_file() else {}
    kind, name = fields.get("model_type"), fields.get("_class_name")
    if isinstance(kind, str) and kind in ENCODERS:
        folder = EncoderFolder.open(path)
        return Component("encoder", kind, folder, abstract_model(folder, None, build=build_encoder), _encoder(path))
    if isinstance(name, str) and name in VAES:
        folder = open_vae_folder(path)
        return Component("VAE", name, folder, abstract_vae(folder), _vae(path))
    return None


def _encoder(path) -> Callable[..., nnx.Module]:
    def load(mesh: jax.sharding.Mesh | None = None, progress: Progress | None = None) -> Any:
        return load_encoder(path, mesh=mesh, progress=progress)

    return load


def _vae(path) -> Callable[..., nnx.Module]:
    def load(mesh: jax.sharding.Mesh | None = None, progress: Progress | None = None) -> Any:
        whole = None if mesh is None else jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return load_vae(path, sharding=whole, progress=progress)

    return load
