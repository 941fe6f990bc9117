"""Whole pipelines in diffusers' layout, component by component: model_index.json, and a folder for each."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion.components import Component, open_component
from conversion.written import write_checked
from models.pipeline_folder import MODEL_INDEX, PipelineFolder
from qvdjax.checkpoint import Progress, new_folder
from qvdjax.checkpoint.atomic import disk_errors
from qvdjax.errors import UserError

_NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*")


def convert_pipeline(
    source: Path,
    target: Path,
    *,
    dtype: np.dtype | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a pipeline anew: weights checked against their models, cast and read back, other files copied.

    One tensor is in memory at a time. The target appears when all of it is complete.

    Args:
        source: Folder with a `model_index.json`.
        target: The new folder.
        dtype: Floating type of all weights; None keeps each as it is. What models keep in float32 becomes no narrower.
        dry_run: Only say what would be done and what is in the way; read no weight and write nothing.
        overwrite: Replace a folder that is there already.
        progress: Called with ("<component>: <stage>", bytes done, bytes in all), see `write_checked`.

    Returns:
        source, target (None on a dry run), layout "pipeline"; components: one each, see `Component.report`; problems:
        what is in the way, {component: message}, empty unless it is a dry run; source_bytes, bytes, and free_bytes of
        the target's disk.

    Raises:
        UserError: Several components are in the way (all are named), or one (its own message); the disk is too small;
            see `write_checked`.
    """
    index = PipelineFolder.open(source)
    components, problems = [], {}
    for name, kind in index.components.items():
        try:
            components.append(open_component(source / name, name, kind, dtype))
        except UserError as error:
            problems[name] = error
    report = {
        "source": str(source),
        "target": None if dry_run else str(target),
        "layout": "pipeline",
        "components": [component.report() for component in components],
        "problems": {name: str(error) for name, error in problems.items()},
        "source_bytes": sum(component.source_bytes for component in components),
        "bytes": sum(component.nbytes for component in components),
        "free_bytes": _free_bytes(target),
    }
    if dry_run:
        return report
    _refuse(source, problems)
    if report["bytes"] > report["free_bytes"]:
        raise UserError(
            f"{target} needs {report['bytes'] / 1e9:.1f} GB, and its disk has {report['free_bytes'] / 1e9:.1f} left",
            remedy="free some space or choose another disk",
        )
    with new_folder(target, overwrite=overwrite) as folder:
        for component in components:
            _write(component, source, folder, progress)
        notices = [file for pattern in _NOTICES for file in source.glob(pattern) if file.is_file()]
        for file in (source / MODEL_INDEX, *notices):
            _copy(file, folder / file.name)
    return report


def _refuse(source: Path, problems: Mapping[str, UserError]):
    if len(problems) == 1:
        raise next(iter(problems.values()))
    if problems:
        raise UserError(
            f"{source} cannot be converted whole",
            remedy="mend or download these, or convert one component with --component",
            items=[str(error) for error in problems.values()],
        )


def _write(component: Component, source: Path, folder: Path, progress: Progress | None):
    if component.planned is None:
        for file in component.files:
            _copy(file, folder / file.relative_to(source))
        return

    def told(stage: str, done: int, total: int) -> None:
        progress(f"{component.name}: {stage}", done, total)

    write_checked(folder / component.name, component.planned, progress=progress and told)


def _copy(file: Path, target: Path):
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)


def _free_bytes(target: Path) -> int:
    """Of the disk that the target would be on."""
    there = next(folder for folder in (target, *target.absolute().parents) if os.path.isdir(folder))
    return shutil.disk_usage(there).free
