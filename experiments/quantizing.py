"""From a model folder to a quantized one."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import models
import qvdjax
from experiments.calibrating import calibrate_folder, open_calibration
from experiments.reconstruction_record import reconstruction_record, record_files
from models.pipeline import side_files
from qvdjax import recipes
from qvdjax.calibration import CalibrationSet
from qvdjax.calibration.selection import SelectedInputs, select
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.ptq.reconstruction import FinishedBlocks

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

    A recipe that reconstructs blocks keeps what is finished in `<target>.work`, the calibration set it made among it;
    the same call goes on from there, and deletes it in the end.

    Returns:
        {recipe, calibration, quantized_layers, weight_bytes, float_bytes, ratio, seconds, layers}; the bytes are those
        of all layers, float_bytes in bfloat16, and `layers` the rows of `qvdjax.describe`. Of a recipe that
        reconstructs blocks also `reconstruction`, which stands in the folder as `reconstruction.json`, too; see
        `experiments.reconstruction_record`.

    Raises:
        UserError: See `models.load`, `qvdjax.recipes.get`, `qvdjax.quantize` and `models.save`.
    """
    check_new(target, overwrite=overwrite)
    started = time.perf_counter()
    chosen = recipes.get(recipe, **(overrides or {}))
    model = models.load(source, progress=progress)
    work = target.with_name(f"{target.name}.work")
    with contextlib.ExitStack() as exits:
        finished = batches = None
        if chosen.needs_calibration:
            batches = _calibration(source, calibration, work if chosen.reconstruction else None, exits, progress)
        if chosen.reconstruction is not None:
            made_by = {"source": str(source.resolve()), "recipe": repr(chosen), "calibration": dict(batches.manifest)}
            finished = FinishedBlocks.open(work / "blocks", made_by)
            if chosen.reconstruction.selection is not None:
                batches = select(batches, chosen.reconstruction.selection)
        elif calibration is not None:
            batches = open_calibration(calibration, source)  # refuses one that does not fit, needed or not
        quantized = qvdjax.quantize(model, chosen, batches, finished=finished, progress=progress)
    record = None
    if finished is not None:
        selected = batches if isinstance(batches, SelectedInputs) else None
        record = reconstruction_record(finished.reports(), selected)
    files = {} if record is None else record_files(record)
    save_quantized(quantized, source, target, overwrite=overwrite, progress=progress, files=files)
    if finished is not None:
        shutil.rmtree(work)
    return {
        "recipe": chosen.name,
        "calibration": None if calibration is None else str(calibration),
        "seconds": time.perf_counter() - started,
        **weights_report(quantized),
        **({} if record is None else {"reconstruction": record}),
    }


def _calibration(source, folder, work, exits, progress) -> CalibrationSet:
    """The set of a folder, or one that is made of the shipped prompts, in the work folder or a temporary one."""
    if folder is None:
        folder = Path(exits.enter_context(tempfile.TemporaryDirectory())) if work is None else work / "calibration"
        calibrate_folder(source, folder, progress=progress)
    return open_calibration(folder, source)


def save_quantized(
    model: VideoModel, source: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:  # fmt: skip
    """Write a quantized model together with the pipeline of the folder it was made from, and further files by name;
    see `models.save`."""
    side = {**side_files(source), **(files or {})}
    models.save(model, target, side_files=side, overwrite=overwrite, progress=progress)


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
