"""What each component of a pipeline is, and what converting it means: weights are checked and cast, other files copied.

diffusers' `model_index.json` names a component's class; what is in its folder decides.
"""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from conversion.source import PICKLES, open_source, refuse_pickles
from conversion.written import PlannedFolder
from models.encoders import ENCODERS, TRANSFORMERS_STEM, EncoderFolder, build_encoder
from models.tokenizer import check_tokenizer_files
from models.vae_folders import VAES, build_vae, open_vae_folder
from qvdjax.checkpoint import CheckpointFolder, TensorSource, all_finite, cast_checked, check_tensors, expected_tensors
from qvdjax.checkpoint.folder import CONFIG, nonfinite_error, read_json
from qvdjax.errors import UserError

_OTHER_WEIGHTS = (".safetensors", ".gguf", ".onnx", ".msgpack", ".h5")


@dataclasses.dataclass(frozen=True)
class Component:
    """One component that can be converted.

    Attributes:
        name, kind: As the index has them.
        planned: The folder of weights that becomes of it; None where files are copied as they are.
        files: Those files.
        source_bytes: Of all tensors, or of the files.
        layout: What its weights are read as.
    """

    name: str
    kind: str
    planned: PlannedFolder | None
    files: tuple[Path, ...]
    source_bytes: int
    layout: str

    @property
    def nbytes(self) -> int:
        """Bytes that will be written."""
        return self.source_bytes if self.planned is None else self.planned.nbytes

    def report(self) -> dict[str, Any]:
        """JSON types: what is known of it before anything is written."""
        tensors = () if self.planned is None else self.planned.tensors
        return {
            "name": self.name,
            "class": self.kind,
            "action": "copy" if self.planned is None else "convert",
            "layout": self.layout,
            "tensors": len(tensors),
            "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
            "source_bytes": self.source_bytes,
            "bytes": self.nbytes,
            "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
        }


def open_component(folder: Path, name: str, kind: str, wanted: np.dtype | None) -> Component:
    """Look at a component: its configuration and the headers of its files; no weight is read.

    Args:
        folder: Its own.
        name, kind: As the index has them.
        wanted: Floating type of the weights; None keeps each as it is.

    Raises:
        UserError: It is missing, damaged, quantized, or not what its configuration says; its weights are pickles.
    """
    if not folder.is_dir():
        raise UserError(f"{folder.parent} lacks the folder {name}, of its {kind}", remedy="download it too")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    if "quantization_config" in config:
        raise UserError(f"{folder} is quantized", remedy="dequantize it with `qvdjax export --format diffusers`")
    architecture = config.get("_class_name")
    if architecture in models.FAMILIES:
        source = open_source(folder)
        expected = expected_tensors(models.abstract(source.config))
        check_tensors(expected, source.tensors, str(folder))
        return _of_weights(name, kind, folder, source.config, source.tensors, expected, wanted, layout=source.layout)
    if architecture in VAES:
        return _of_folder(name, kind, open_vae_folder(folder), build_vae, wanted)
    if config.get("model_type") in ENCODERS and "architectures" in config:
        return _of_encoder(name, kind, folder, wanted)
    return _of_files(name, kind, folder)


def _of_encoder(name: str, kind: str, folder: Path, wanted: np.dtype | None) -> Component:
    opened = EncoderFolder.open(folder)
    config = dict(opened.config)
    for field in ("dtype", "torch_dtype"):  # transformers' note of the type of the weights
        if wanted is not None and field in config:
            config[field] = str(wanted)
    opened = dataclasses.replace(opened, config=config)
    return _of_folder(name, kind, opened, build_encoder, wanted, stem=TRANSFORMERS_STEM, layout="transformers")


def _of_folder(
    name: str, kind: str, opened: CheckpointFolder, build, wanted: np.dtype | None, *, layout: str = "diffusers",
    **options,
) -> Component:  # fmt: skip
    tensors = {key: opened.info(key) for key in opened.keys}
    expected = expected_tensors(jax.eval_shape(lambda: build(opened.config)))
    check_tensors(expected, tensors, str(opened.path))
    return _of_weights(
        name, kind, opened.path, opened.config, tensors, expected, wanted, layout=layout, read=opened.read, **options
    )


def _of_weights(
    name: str, kind: str, path: Path, config: dict, tensors, expected, wanted: np.dtype | None, *, layout: str,
    read=None, **options,
) -> Component:  # fmt: skip
    """`tensors`: what is found by name, with `shape` and `dtype`; without `read` each reads itself."""

    def values_of(key: str) -> np.ndarray:
        return tensors[key].read() if read is None else read(key)

    def make(key: str, dtype: np.dtype) -> np.ndarray:
        values = values_of(key)
        if not all_finite(values):
            bad = [other for other in tensors if other == key or not all_finite(values_of(other))]
            raise nonfinite_error(str(path), bad)
        return cast_checked(values, dtype, f"{path}: {key}")

    planned = []
    for key, wish in expected.items():
        found = tensors[key]
        dtype = wish.cast_to(found.dtype, wanted)
        planned.append(TensorSource(key, found.shape, dtype, functools.partial(make, key, dtype)))
    source_bytes = sum(math.prod(found.shape) * found.dtype.itemsize for found in tensors.values())
    return Component(name, kind, PlannedFolder(config, planned, expected, **options), (), source_bytes, layout)


def _of_files(name: str, kind: str, folder: Path) -> Component:
    """A tokenizer, a scheduler, a processor of images: files that are copied; never a pickle, nor an unknown model."""
    files = tuple(sorted(file for file in folder.rglob("*") if file.is_file()))
    if pickles := [file.name for file in files if file.suffix in PICKLES]:
        refuse_pickles(pickles, folder)
    if weights := [file.name for file in files if file.suffix in _OTHER_WEIGHTS]:
        raise UserError(
            f"{folder} holds weights of {kind}, which is not known here", remedy="take it out of model_index.json",
            items=weights,
        )  # fmt: skip
    if not files:
        raise UserError(f"{folder} is empty", remedy=f"download the files of its {kind} too")
    if "tokenizer" in name:
        check_tokenizer_files(folder)
    return Component(name, kind, None, files, sum(file.stat().st_size for file in files), "files")
