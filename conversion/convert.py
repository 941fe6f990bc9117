"""Bring a checkpoint into diffusers' layout, tensor by tensor."""

import collections
import functools
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import models
from conversion.motion_adapter import merge, refuse_parts
from conversion.pipeline import convert_pipeline
from conversion.source import Source, SourceTensor, open_source
from conversion.written import PlannedFolder, write_checked
from models.pipeline_folder import PipelineFolder, is_pipeline_folder
from qvdjax.checkpoint import (
    Expected,
    Progress,
    TensorSource,
    all_finite,
    cast_checked,
    check_tensors,
    expected_tensors,
    floating_dtype,
)
from qvdjax.checkpoint.folder import nonfinite_error
from qvdjax.errors import UserError


def convert(
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    component: str | None = None,
    motion_adapter: str | os.PathLike | None = None,
    dtype: Any = None,
    dry_run: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a checkpoint as a diffusers folder that `models.load` reads, or a whole pipeline as one.

    Memory is bounded by a few copies of the largest tensor: one is read, checked, cast and written at a time. What was
    written is read back before it appears under its name.

    Args:
        source: What `conversion.source.open_source` accepts; a folder whose `model_index.json` names components is a
            whole pipeline, see `convert_pipeline`.
        target: The new folder; it appears complete or not at all.
        component: Of a pipeline, what alone becomes the target: the name of a transformer or UNet.
        motion_adapter: A folder of AnimateDiff's motion modules; the source is then the image UNet to put them into.
        dtype: Floating type of the weights; None keeps each as it is, float64 too. Weights that a model
            keeps in float32 become no narrower than that.
        dry_run: Check names, shapes and types only; read no weight and write nothing.
        overwrite: Replace a folder that is there already.
        progress: Called with (stage, bytes done, bytes in all) after each tensor, see `write_checked`.

    Returns:
        Of a whole pipeline what `convert_pipeline` returns, otherwise a report: source, target (None on a dry run),
        family, layout, config and where it comes from, number of tensors, of parameters and of renamed keys, bytes
        before and after, number of tensors of each type, and the side files copied along.

    Raises:
        UserError: The source cannot be read or is no known model; the motion adapter does not fit it; tensors are
            unknown, missing or mis-shaped (all named); weights are NaN, infinite or overflow `dtype`; the source is
            quantized; the target exists or cannot be written.
    """
    wanted = None if dtype is None else floating_dtype(dtype)
    if component is not None:
        source = PipelineFolder.open(source).component(component)
    elif motion_adapter is None and is_pipeline_folder(source) and PipelineFolder.open(source).components:
        return convert_pipeline(
            Path(source), Path(target), dtype=wanted, dry_run=dry_run, overwrite=overwrite, progress=progress
        )
    opened = open_source(source)
    if "quantization_config" in opened.config:
        raise UserError(f"{source} is quantized", remedy="dequantize it with `qvdjax export --format diffusers`")
    if motion_adapter is not None:
        opened = merge(opened, open_source(motion_adapter))
    refuse_parts(opened)
    expected = expected_tensors(models.abstract(opened.config))
    check_tensors(expected, opened.tensors, str(opened.path))
    tensors = [_written(opened, expected[key], wanted) for key in expected]
    if not dry_run:
        planned = PlannedFolder(opened.config, tensors, expected, side_files=opened.side_files)
        write_checked(target, planned, overwrite=overwrite, progress=progress)
    return {
        "source": str(opened.path),
        "target": None if dry_run else str(target),
        "family": models.family_of(opened.config).name,
        "layout": opened.layout,
        "config": opened.config,
        "config_from": opened.config_from,
        "tensors": len(tensors),
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "renamed": sum(key != tensor.key for key, tensor in opened.tensors.items()),
        "source_bytes": sum(math.prod(t.shape) * t.dtype.itemsize for t in opened.tensors.values()),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": dict(collections.Counter(str(tensor.dtype) for tensor in tensors)),
        "side_files": sorted(opened.side_files),
    }


def _written(opened: Source, expected: Expected, wanted: np.dtype | None) -> TensorSource:
    found = opened.tensors[expected.key]
    dtype = expected.cast_to(found.dtype, wanted)
    make = functools.partial(checked_cast, opened.tensors, expected.key, dtype, opened.path)
    return TensorSource(expected.key, found.shape, dtype, make)


def checked_cast(tensors: Mapping[str, SourceTensor], key: str, dtype: np.dtype, path: Path) -> np.ndarray:
    """One tensor in the wanted type.

    Raises:
        UserError: It holds NaN or infinity (then all tensors are read, to name every one that does), or
            overflows.
    """
    values = tensors[key].read()
    if not all_finite(values):
        bad = [name for name, tensor in tensors.items() if name == key or not all_finite(tensor.read())]
        raise nonfinite_error(str(path), bad)
    return cast_checked(values, dtype, f"{path}: {key}")
