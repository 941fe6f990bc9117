"""Model folders: diffusers' config.json and safetensors, plain or quantized, in and out, without PyTorch."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.families import FAMILIES, build
from qvdjax.checkpoint import (
    CheckpointFolder,
    Progress,
    check_tensors,
    expected_tensors,
    load_variables,
    save_variables,
    stored_variables,
)
from qvdjax.checkpoint.quantization_config import from_config, schemes_of, to_config
from qvdjax.errors import UserError
from qvdjax.nn import EXECUTIONS, QUANTIZED_LAYERS, TABLE_LAYERS, Execution, VideoModel, layers_of
from qvdjax.parallel import shardings
from qvdjax.ptq import apply_schemes
from qvdjax.quantization import best_execution


def skeleton(folder: str | os.PathLike | CheckpointFolder, *, execution: Execution | None = None) -> VideoModel:
    """The model of a folder as shapes and the file's dtypes; quantized layers are in place, no weight is read.

    Raises:
        UserError: See `load`.
    """
    folder = used_tensors(folder if isinstance(folder, CheckpointFolder) else CheckpointFolder.open(folder))
    model = abstract_model(folder, execution)
    check_tensors(expected_tensors(model), {key: folder.info(key) for key in folder.keys}, str(folder.path))
    graph, state = nnx.split(model)
    leaves = []
    for stored in stored_variables(model):
        dtype = stored.value.dtype if stored.codes else folder.info(stored.names[0]).dtype
        leaves.append((stored.path, stored.variable.replace(jax.ShapeDtypeStruct(stored.value.shape, dtype))))
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def used_tensors(folder: CheckpointFolder) -> CheckpointFolder:
    """A folder without the tensors that its family leaves unused, see `Family`."""
    family = FAMILIES.get(folder.config.get("_class_name"))
    if family is None or not family.unused:
        return folder
    files = {key: file for key, file in folder.files.items() if not key.endswith(family.unused)}
    return dataclasses.replace(folder, files=files)


def abstract_model(
    folder: CheckpointFolder, execution: Execution | None, *, build: Callable[[Mapping], nnx.Module] = build
) -> nnx.Module:
    """The model that a folder's config describes, quantized layers in place, without a look at its tensors.

    Args:
        folder: Whatever holds the config.
        execution: Of quantized layers; None for the device's best.
        build: Makes the float model from the fields of the config.

    Raises:
        UserError: An unknown architecture or execution; a quantization that is not ours or does not fit.
    """
    execution = execution or best_execution()[0]
    if execution not in EXECUTIONS:
        raise UserError(f"unknown execution {execution!r}", remedy=f"use one of {', '.join(EXECUTIONS)}")
    if "quantization_config" not in folder.config:
        return jax.eval_shape(lambda: build(folder.config))
    where = str(folder.path / "config.json")
    schemes, recipe = from_config(folder.config["quantization_config"], where)
    try:
        model = jax.eval_shape(lambda: apply_schemes(build(folder.config), schemes, execution=execution))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{where}: quantization_config does not fit the model ({error})", remedy="quantize the model again"
        ) from error
    if strangers := sorted(set(schemes) - set(schemes_of(model))):
        raise UserError(
            f"{where}: quantization_config names layers that the model lacks", remedy="quantize the model again",
            items=strangers,
        )  # fmt: skip
    model.recipe_name = recipe
    return model


def load(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: jax.sharding.Mesh | None = None,
    execution: Execution | None = None,
    progress: Progress | None = None,
) -> VideoModel:
    """Read a model folder, quantized or plain diffusers.

    Args:
        path: The folder (config.json and safetensors, whole or in shards).
        dtype: Floating type of the weights; None keeps the file's. Float32 islands (norms, modulation tables, the
            timestep's MLP) become no narrower than float32.
        mesh: Where parameters are sharded by their logical axes (`qvdjax.parallel`); each process reads only
            its shards. None: the first device.
        execution: How quantized products are computed: "integer", "simulate", or None for the device's best.
        progress: Called with (stage, bytes done, bytes in all).

    Raises:
        UserError: A missing, truncated or corrupt file; unknown, missing or mis-shaped keys; weights that are not
            finite; an unknown architecture; a quantization that is not ours.
    """
    folder = used_tensors(CheckpointFolder.open(path))
    abstract = abstract_model(folder, execution)
    where = None if mesh is None else shardings(abstract, mesh)
    dtype = None if dtype is None else jnp.dtype(dtype)
    return load_variables(abstract, folder, dtype=dtype, shardings=where, progress=progress)


def save(
    model: VideoModel,
    path: str | os.PathLike,
    *,
    side_files: Mapping[str, Path | bytes] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a model as a folder that `load` reads back bit for bit.

    The folder appears under its name complete or not at all; memory is bounded by the largest tensor of one layer.

    Args:
        model: Plain, quantized, or with tables.
        path: A new folder.
        side_files: Further files by name, for instance a pipeline.json; content or a file to copy.
        overwrite: Replace a folder that exists.
        progress: Called with (stage, bytes done, bytes in all).

    Raises:
        UserError: The target exists or cannot be written, or the disk is full.
    """
    config = model.config.to_dict()
    if any(True for _ in layers_of(model, (*QUANTIZED_LAYERS, *TABLE_LAYERS))):
        config["quantization_config"] = to_config(schemes_of(model), model.recipe_name)
    save_variables(model, path, config, side_files=side_files, overwrite=overwrite, progress=progress)
