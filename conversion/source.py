"""What is to be converted: where its weights lie, which layout they are in, and its configuration."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np

from conversion import hunyuanvideo_original, wan_original
from models.families import FAMILIES
from models.scheduler import SCHEDULER, scheduler_file
from qvdjax.checkpoint import CheckpointFolder, SafetensorsFile, read_json
from qvdjax.checkpoint.folder import CONFIG, INDEX, WEIGHTS, read_shards
from qvdjax.errors import UserError

SIDE_FILES = ("pipeline.json", "word_table.safetensors", SCHEDULER)
# Original layouts by name: whose it is, and what knows it.
LAYOUTS: dict[str, tuple[str, ModuleType]] = {
    "wan-original": ("Wan", wan_original),
    "hunyuanvideo-original": ("HunyuanVideo", hunyuanvideo_original),
}
# What a layer is called in diffusers' layout of a family, and in no other's: its configuration is read from shapes.
_SIGNS = {
    "condition_embedder.time_proj.": wan_original,
    "context_embedder.token_refiner.": hunyuanvideo_original,
}
PICKLES = (".pt", ".pth", ".bin", ".ckpt")


@dataclasses.dataclass(frozen=True)
class SourceTensor:
    """One tensor of the source under its own name, or some rows of it (see `Place`); read when asked."""

    file: SafetensorsFile
    key: str
    rows: tuple[tuple[int, int], ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        whole = self.file.tensors[self.key].shape
        return whole if self.rows is None else (sum(stop - start for start, stop in self.rows), *whole[1:])

    @property
    def dtype(self) -> np.dtype:
        """Its type in the file."""
        return self.file.tensors[self.key].dtype

    def read(self) -> np.ndarray:
        """All of it."""
        if self.rows is None:
            return self.file.read(self.key)
        return np.concatenate([self.file.read(self.key, (slice(*stretch),)) for stretch in self.rows])


@dataclasses.dataclass(frozen=True)
class Source:
    """An opened checkpoint.

    Attributes:
        path: The file or folder that holds the weights.
        layout: "diffusers", one of `LAYOUTS`, or "image UNet and motion adapter" where two checkpoints are one model.
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
    .safetensors file, or a folder with one (or several and their index), with diffusers' names or the original ones of
    Wan or HunyuanVideo.

    Raises:
        UserError: Nothing is there, or a PyTorch pickle, or several candidates; keys are unknown; the
            configuration cannot be found.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist", remedy="check the path")
    folder, files = (path.parent, _single_file(path)) if path.is_file() else _folder_files(path)
    raw = {key: SourceTensor(file, key) for key, file in files.items()}
    layout = next((name for name, (_, module) in LAYOUTS.items() if module.is_original(raw)), "diffusers")
    tensors = raw if layout == "diffusers" else _renamed(raw, path, layout)
    config, config_from = _config(folder, tensors, layout)
    unused = FAMILIES[config["_class_name"]].unused if config.get("_class_name") in FAMILIES else ()
    tensors = {key: tensor for key, tensor in tensors.items() if not (unused and key.endswith(unused))}
    side_files = {name: folder / name for name in SIDE_FILES if (folder / name).is_file()}
    if scheduler := scheduler_file(folder):  # as a rule in a folder beside the weights, where the target has none
        side_files[SCHEDULER] = scheduler
    return Source(path, layout, config, config_from, tensors, side_files)


def refuse_pickles(names: list[str], where: Path):
    """UserError about PyTorch files, which may run code when opened."""
    raise UserError(
        f"{where} holds PyTorch pickles, which can run code when they are opened",
        remedy="save it once as safetensors (safetensors.torch.save_file) where you trust it",
        items=names,
    )


def _single_file(path: Path) -> dict[str, SafetensorsFile]:
    if path.suffix in PICKLES:
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
    if pickles := sorted(f.name for f in path.glob("*") if f.suffix in PICKLES):
        refuse_pickles(pickles, path)
    what = "holds no safetensors files" if any(path.iterdir()) else "is empty"
    raise UserError(f"{path} {what}", remedy="name a diffusers folder or a .safetensors file")


def _renamed(raw: Mapping[str, SourceTensor], path: Path, layout: str) -> dict[str, SourceTensor]:
    whose, module = LAYOUTS[layout]
    if unknown := [key for key in raw if module.to_diffusers(key) is None]:
        remedy = "remove them, or convert the transformer's weights alone"
        what = f"holds keys that {whose}'s original layout does not have"
        raise UserError(f"{path} {what}", remedy=remedy, items=unknown)
    places = module.places({key: tensor.shape for key, tensor in raw.items()})
    used = {place.key for place in places.values()}
    if twice := [key for key in raw if key not in used]:  # the same key with and without the prefix
        what = "holds keys twice, with and without a prefix"
        raise UserError(f"{path} {what}", remedy="remove one copy", items=twice)
    return {name: dataclasses.replace(raw[place.key], rows=place.rows) for name, place in places.items()}


def _config(folder: Path, tensors: Mapping[str, SourceTensor], layout: str) -> tuple[dict, str]:
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if layout != "diffusers":
        module = LAYOUTS[layout][1]
    elif config:
        return config, CONFIG
    else:
        module = next((m for sign, m in _SIGNS.items() if any(key.startswith(sign) for key in tensors)), None)
    if module is None:
        remedy = "put the checkpoint's config.json beside the weights"
        raise UserError(f"{folder} holds no {CONFIG}", remedy=remedy)
    where = f"shapes and the original {CONFIG}" if config else f"shapes; {module.ASSUMED}"
    return module.infer_config(tensors, config), where
