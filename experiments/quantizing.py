"""From a model folder to a quantized one."""

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import qvdjax
from experiments.calibrating import calibrate_folder, open_calibration
from models.pipeline import side_files
from qvdjax import recipes
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""


def quantize_folder(
    source: Path,
    target: Path,
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    calibration: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model folder, and take along what sampling needs beside the weights.

    Args:
        source: Full-precision model folder.
        target: The new folder; it appears complete or not at all.
        recipe: `<method>-w<bits>a<bits>`, see `qvdjax.recipes.names`.
        overrides: Options of the method by name; text is read as the option's type.
        calibration: Folder made by `calibrate_folder`. Without one, a recipe that needs it is calibrated on
            the shipped prompts.
        overwrite: Replace a folder that is there already.
        progress: Called with the stage, what is done of it and its total.

    Returns:
        {recipe, calibration, quantized_layers, weight_bytes, float_bytes, ratio, seconds, layers}; the bytes
        are those of all layers, float_bytes in bfloat16, and `layers` the rows of `qvdjax.describe`.

    Raises:
        UserError: See `models.load`, `qvdjax.recipes.get`, `qvdjax.quantize` and `models.save`.
    """
    check_new(target, overwrite=overwrite)
    started = time.perf_counter()
    chosen = recipes.get(recipe, **(overrides or {}))
    model = models.load(source, progress=progress)
    with tempfile.TemporaryDirectory() as made:
        batches = None
        if calibration is not None:
            batches = open_calibration(calibration, source)
        elif chosen.needs_calibration:
            calibrate_folder(source, Path(made), progress=progress)
            batches = open_calibration(Path(made), source)
        quantized = qvdjax.quantize(model, chosen, batches)
    save_quantized(quantized, source, target, overwrite=overwrite, progress=progress)
    return {
        "recipe": chosen.name,
        "calibration": None if calibration is None else str(calibration),
        "seconds": time.perf_counter() - started,
        **weights_report(quantized),
    }


def save_quantized(
    model: VideoModel, source: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a quantized model together with the pipeline of the folder it was made from; see `models.save`."""
    models.save(model, target, side_files=side_files(source), overwrite=overwrite, progress=progress)


def weights_report(model: VideoModel) -> dict[str, Any]:
    """{quantized_layers, weight_bytes, float_bytes, ratio, layers} of a quantized model."""
    layers = qvdjax.describe(model)
    weight_bytes, float_bytes = (sum(row[key] for row in layers) for key in ("bytes", "float_bytes"))
    return {
        "quantized_layers": sum(row["execution"] != "float" for row in layers),
        "weight_bytes": weight_bytes,
        "float_bytes": float_bytes,
        "ratio": weight_bytes / float_bytes,
        "layers": layers,
    }


def check_new(target: Path, *, overwrite: bool = False) -> None:
    """Refuse a target that is taken before hours are spent on what cannot be written there."""
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} exists and is not empty", remedy="choose another target or give --overwrite")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} exists and is no folder", remedy="choose another target")
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be written", remedy="choose a target that can be written")
