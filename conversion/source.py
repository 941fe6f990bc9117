"""What is to be converted: where its weights lie, which layout they are in, and its configuration."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from conversion import wan_original
from models.scheduler import SCHEDULER, scheduler_file
from qvdjax.checkpoint import CheckpointFolder, SafetensorsFile, read_json
from qvdjax.checkpoint.folder import CONFIG, INDEX, WEIGHTS, read_shards
from qvdjax.errors import UserError

SIDE_FILES = ("pipeline.json", "word_table.safetensors", SCHEDULER)
_PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of the source under its own name; read when asked."""

    file: SafetensorsFile
    key: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.file.tensors[self.key].shape

    @property
    def dtype(self) -> np.dtype:
        """Its type in the file."""
        return self.file.tensors[self.key].dtype

    def read(self) -> np.ndarray:
        """All of it."""
        return self.file.read(self.key)


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: The file or folder that holds the weights.
        layout: "diffusers", "wan-original", or "image UNet and motion adapter" where two checkpoints are one model.
        config: The fields of diffusers' config.json.
        config_from: Where they come from, in words.
        tensors: diffusers key -> tensor.
        side_files: Name -> file, of what belongs to the model and is copied along.
    """

    path: Path
    layout: str
    config: dict
    config_from: str
    tensors: Mapping[str, SourceTensor]
    side_files: Mapping[str, Path]


def open_source(path: str | os.PathLike) -> Source:
    """Find the weights and read headers and configuration; no weight is read yet.

    Accepted: a model folder of diffusers; a pipeline folder of diffusers, whose `transformer` is taken; a
    .safetensors file, or a folder with one (or several and their index), with diffusers' or Wan's original
    names.

    Raises:
        UserError: Nothing is there, or a PyTorch pickle, or several candidates; keys are unknown; the
            configuration cannot be found.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist", remedy="check the path")
    folder, files = (path.parent, _single_file(path)) if path.is_file() else _folder_files(path)
    raw = {key: SourceTensor(file, key) for key, file in files.items()}
    original = wan_original.is_original(raw)
    tensors = _renamed(raw, path) if original else raw
    config, config_from = _config(folder, tensors, original)
    side_files = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
    if scheduler := scheduler_file(folder):  # as a rule in a folder beside the weights, where the target has none
        side_files[SCHEDULER] = scheduler
    return Source(path, "wan-original" if original else "diffusers", config, config_from, tensors, side_files)


def refuse_pickles(names: list[str], where: Path):
    """UserError about PyTorch files, which may run code when opened."""
    raise UserError(
        f"{where} holds PyTorch pickles, which can run code when they are opened",
        remedy="save it once as safetensors (safetensors.torch.save_file) where you trust it",
        items=names,
    )


def _single_file(path: Path) -> dict[str, SafetensorsFile]:
    if path.suffix in _PICKLES:
        refuse_pickles([path.name], path.parent)
    if path.name.endswith(".safetensors.index.json"):
        return read_shards(path)
    file = SafetensorsFile(path)
    return dict.fromkeys(file.tensors, file)


def _folder_files(path: Path) -> tuple[Path, dict[str, SafetensorsFile]]:
    """The folder that holds the weights, and which file holds each key."""
    inner = [name for name in ("transformer", "transformer_2", "unet") if (path / name / CONFIG).is_file()]
    if not (path / CONFIG).is_file() and inner:
        if len(inner) > 1:
            names = [str(path / name) for name in inner]
            remedy = "convert them one at a time"
            raise UserError(f"{path} holds several models", remedy=remedy, items=names)
        path = path / inner[0]
    if (path / WEIGHTS).exists() or (path / INDEX).exists():
        return path, dict(CheckpointFolder.open(path, require_config=False).files)
    indices = sorted(path.glob("*.safetensors.index.json"))
    weights = indices or sorted(f for f in path.glob("*.safetensors") if f.name not in SIDE_FILES)
    if len(weights) == 1:
        return path, _single_file(weights[0])
    if weights:
        names = [file.name for file in weights]
        what = "holds several weight files without an index"
        raise UserError(f"{path} {what}", remedy="name one of them", items=names)
    if pickles := sorted(f.name for f in path.glob("*") if f.suffix in _PICKLES):
        refuse_pickles(pickles, path)
    what = "holds no safetensors files" if any(path.iterdir()) else "is empty"
    raise UserError(f"{path} {what}", remedy="name a diffusers folder or a .safetensors file")


def _renamed(raw: Mapping[str, SourceTensor], path: Path) -> dict[str, SourceTensor]:
    names = {key: wan_original.to_diffusers(key) for key in raw}
    if unknown := [key for key, name in names.items() if name is None]:
        remedy = "remove them, or convert the transformer's weights alone"
        what = "holds keys that Wan's original layout does not have"
        raise UserError(f"{path} {what}", remedy=remedy, items=unknown)
    renamed = {name: raw[key] for key, name in names.items()}
    if len(renamed) < len(raw):  # the same key with and without the prefix
        twice = [key for key, name in names.items() if renamed[name].key != key]
        what = "holds keys twice, with and without a prefix"
        raise UserError(f"{path} {what}", remedy="remove one copy", items=twice)
    return renamed


def _config(folder: Path, tensors: Mapping[str, SourceTensor], original: bool) -> tuple[dict, str]:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if config and not original:
        return config, CONFIG
    if not original and not any(key.startswith("condition_embedder.time_proj.") for key in tensors):
        remedy = "put the checkpoint's config.json beside the weights"
        raise UserError(f"{folder} holds no {CONFIG}", remedy=remedy)
    where = f"shapes and the original {CONFIG}" if config else "shapes; a head is taken to have 128 features"
    return wan_original.infer_config(tensors, config), where
