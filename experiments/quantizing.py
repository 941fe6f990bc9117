"""From a model folder to a quantized one."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import models
import qvdjax
from experiments.calibrating import calibrate_folder, check_sampled_alike, open_calibration
from experiments.reconstruction_record import reconstruction_record, record_files
from models.components import Component, component_of
from models.pipeline import side_files
from qvdjax import recipes
from qvdjax.calibration.selection import SelectedInputs, select
from qvdjax.checkpoint import CheckpointFolder, fingerprint
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.parallel import check_same, make_mesh, on_first, together, with_the_others
from qvdjax.ptq.reconstruction import FinishedBlocks
from qvdjax.recipes import Recipe

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""


def quantize_folder(
    source: Path,
    target: Path,
    recipe: str,
    *,
    overrides: Mapping[str, Any] | None = None,
    calibration: Path | None = None,
    mesh: Mapping[str, int] | None = None,
    overwrite: bool = False,
    other_sampler: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model folder, and take along what sampling needs beside the weights; or a component of a pipeline.

    Several processes (`qvdjax.parallel.initialize_distributed`) all call this with the same arguments and see the same
    folders; the first one writes.

    Args:
        source: Full-precision folder of a video model, or of an encoder or a VAE, for which there are no calibration
            sets.
        target: The new folder; it appears complete or not at all.
        recipe: `<method>-w<bits>a<bits>`, see `qvdjax.recipes.names`.
        overrides: Options of the method by name; text is read as the option's type.
        calibration: Folder made by `calibrate_folder`. Without one, a recipe that needs it is calibrated on
            the shipped prompts.
        mesh: Devices to spread the model over, axis name to size; by default the first device, of several processes
            "fsdp=-1", all devices of all of them.
        overwrite: Replace a folder that is there already.
        other_sampler: Take a calibration set of another solver, schedule or number of frames than the folder's.
        progress: Called with the stage, what is done of it and its total.

    A calibration set that is made, and blocks that are reconstructed, are kept in `<target>.work`; the same call goes
    on from there after an interruption, and deletes it in the end.

    Returns:
        {recipe, calibration, quantized_layers, weight_bytes, float_bytes, ratio, seconds, layers}; the bytes are those
        of all layers, float_bytes in bfloat16, and `layers` the rows of `qvdjax.describe`. Of a recipe that
        reconstructs blocks also `reconstruction`, which stands in the folder as `reconstruction.json`, too; see
        `experiments.reconstruction_record`.

    Raises:
        UserError: See `models.load`, `qvdjax.recipes.get`, `check_sampled_alike`, `qvdjax.quantize` and `models.save`.
    """
    on_first(check_new, target, overwrite=overwrite)
    started = time.perf_counter()
    chosen = recipes.get(recipe, **(overrides or {}))
    check_same("options", {"source": source, "target": target, "recipe": repr(chosen), "mesh": mesh})
    if mesh is None and jax.process_count() > 1:
        mesh = {"fsdp": -1}
    devices = None if mesh is None else make_mesh(mesh)
    if component := together(component_of, source):
        _refuse_calibration(component, chosen, calibration)
        model = together(component.load, mesh=devices, progress=progress)
        quantized = _quantized(model, chosen, devices, None, progress=progress)
        together(models.save, quantized, target, overwrite=overwrite, progress=progress)
        return _report(chosen, None, started, quantized, None)
    work = target.absolute().with_name(f"{target.absolute().name}.work")
    finished = batches = None
    if chosen.needs_calibration:
        if calibration is None:
            calibrate_folder(source, work / "calibration", mesh=mesh, progress=progress)
        batches = together(open_calibration, calibration or work / "calibration", source)
    elif calibration is not None:
        together(open_calibration, calibration, source)  # refuses one that does not fit, needed or not
    if batches is not None and calibration is not None and not other_sampler:
        together(check_sampled_alike, batches, source)
    if chosen.reconstruction is not None:
        weights = together(fingerprint, CheckpointFolder.open(source))
        made_by = {"weights": weights, "recipe": repr(chosen), "calibration": dict(batches.manifest)}
        finished = FinishedBlocks.open(work / "blocks", made_by)
        if chosen.reconstruction.selection is not None:
            batches = select(batches, chosen.reconstruction.selection)
    model = together(models.load, source, mesh=devices, progress=progress)
    quantized = _quantized(model, chosen, devices, batches, finished=finished, progress=progress)
    record = None
    if finished is not None:
        selected = batches if isinstance(batches, SelectedInputs) else None
        record = reconstruction_record(finished.reports(), selected)
    files = {} if record is None else record_files(record)
    together(save_quantized, quantized, source, target, overwrite=overwrite, progress=progress, files=files)
    on_first(shutil.rmtree, work, ignore_errors=True)  # may not be there
    return _report(chosen, calibration, started, quantized, record)


def _quantized(model: nnx.Module, chosen: Recipe, devices: Mesh | None, batches, **how) -> nnx.Module:
    """Quantized on the mesh where there is one, together with other processes; `how` goes to `qvdjax.quantize`."""
    with contextlib.nullcontext() if devices is None else jax.set_mesh(devices), with_the_others():
        return qvdjax.quantize(model, chosen, batches, **how)


def _refuse_calibration(component: Component, chosen: Recipe, calibration: Path | None) -> None:
    """UserError where a calibration set is needed or given: they are made of a video model's inputs."""
    if not chosen.needs_calibration and calibration is None:
        return
    said = f"{chosen.name} needs a calibration set" if chosen.needs_calibration else f"{calibration} was given"
    raise UserError(
        f"{said}, and {component.folder.path} is the {component.kind} {component.architecture}",
        remedy="calibration sets are of video models; round its weights alone, with rtn-w8a16 or rtn-w4a16",
    )


def _report(chosen: Recipe, calibration: Path | None, started: float, quantized: nnx.Module, record) -> dict[str, Any]:
    """What `quantize_folder` returns."""
    return {
        "recipe": chosen.name,
        "calibration": None if calibration is None else str(calibration),
        "seconds": time.perf_counter() - started,
        **weights_report(quantized),
        **({} if record is None else {"reconstruction": record}),
    }


def save_quantized(
    model: VideoModel, source: Path, target: Path, *, overwrite: bool = False, progress: Progress | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:  # fmt: skip
    """Write a quantized model together with the pipeline of the folder it was made from, and further files by name;
    see `models.save`."""
    side = {**side_files(source), **(files or {})}
    models.save(model, target, side_files=side, overwrite=overwrite, progress=progress)


def weights_report(model: nnx.Module) -> dict[str, Any]:
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
