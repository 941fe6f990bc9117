"""Our folders in the layouts of other programs."""

import dataclasses
import functools
import os
from collections.abc import Collection, Mapping
from typing import Any, Literal, get_args

import numpy as np

import models
from conversion import compressed_tensors
from conversion.place import Place
from conversion.source import LAYOUTS, SIDE_FILES
from conversion.stored_layers import StoredLayer, stored_layers
from qvdjax.checkpoint import (
    CheckpointFolder,
    Expected,
    Progress,
    TensorSource,
    all_finite,
    expected_tensors,
    floating_dtype,
    write_folder,
)
from qvdjax.checkpoint.folder import nonfinite_error
from qvdjax.errors import UserError
from qvdjax.nn import Attention, Linear, layers_of, refuse_tables

Format = Literal["diffusers", "wan-original", "hunyuanvideo-original", "compressed-tensors"]
EXPORT_FORMATS: tuple[str, ...] = get_args(Format)


def export(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: Format,
    *,
    dtype: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a model folder for other programs, tensor by tensor.

    "diffusers": floats under diffusers' names; quantized weights become the numbers their codes stand for,
    with channel scales taken off again. What only happens to activations is lost.
    "wan-original", "hunyuanvideo-original": the same in that family's original layout, with the original config.json.
    "compressed-tensors": codes and scales as that library reads them (see `conversion.compressed_tensors`).
    Quantized convolutions, which its readers do not know, become floats.

    Args:
        source: A model folder, plain or quantized.
        target: The new folder; it appears complete or not at all.
        format: One of `EXPORT_FORMATS`.
        dtype: Floating type of the weights; None keeps each as it is and makes dequantized ones float32.
            Scales are never cast.
        overwrite: Replace a folder that is there already.
        progress: Called with ("writing", bytes done, bytes in all) after each tensor.

    Returns:
        A report: source, target, format, number of tensors, bytes, names of dequantized layers, names of
        attentions whose quantized products the layout does not say, the side files copied along, and for
        compressed-tensors how much rounding zero points changed.

    Raises:
        UserError: Unknown format; the source is no model folder of ours, or incomplete, or has tables over
            timesteps or codes for each interval of them; the layout cannot say what the model is; weights are NaN,
            infinite or overflow `dtype`; the target exists or cannot be written.
    """
    if format not in EXPORT_FORMATS:
        raise UserError(f"unknown export format {format!r}", remedy=f"use one of {', '.join(EXPORT_FORMATS)}")
    wanted = None if dtype is None else floating_dtype(dtype)
    folder = CheckpointFolder.open(source)
    skeleton = models.skeleton(folder)  # which also checks every tensor's name, shape and type
    refuse_tables(skeleton, str(folder.path), "export the folder it was made from: no other format has tables")
    layers = stored_layers(folder)
    if shifted := [name for name, layer in layers.items() if "shift" in layer.scheme.transforms]:
        raise UserError(
            "layers that shift their input have no form in other formats: they keep an exact product of the shift",
            remedy="quantize with --set shift=false", items=shifted,
        )  # fmt: skip
    estimates = {name: layer.scheme.estimator for name, layer in layers.items() if layer.scheme.estimator is not None}
    if gained := [name for name, estimator in estimates.items() if estimator.frames is not None]:
        raise UserError(
            "estimates with a gain for each frame have no form in other formats: no weight is one for all frames",
            remedy="quantize with --set gains=none", items=gained,
        )  # fmt: skip
    if cut := [name for name, layer in layers.items() if layer.scheme.timestep_intervals is not None]:
        raise UserError(
            "codes for each interval of timesteps have no form in other formats: no weight is one for all timesteps",
            remedy="quantize with --set timestep_intervals=1", items=cut,
        )  # fmt: skip
    side_files = {name: folder.path / name for name in SIDE_FILES if (folder.path / name).is_file()}
    report: dict[str, Any] = {"source": str(source), "target": str(target), "format": format}
    if format == "compressed-tensors":
        tensors, config, details = _compressed(folder, layers, wanted)
        report |= details
    else:
        tensors = _float_tensors(folder, layers, wanted)
        config = _float_config(folder)
        report["dequantized"] = sorted(layers)
    if format in LAYOUTS:
        tensors, config, side_files = _original(tensors, config, format), _original_config(config, format), {}
    write_folder(target, config, tensors, side_files=side_files, overwrite=overwrite, progress=progress)
    attentions = layers_of(skeleton, (Attention,))
    report["attention_left_out"] = [
        n for names, _, a in attentions if a.scheme.qk_bits or a.scheme.pv_bits for n in names
    ]
    return report | {
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "side_files": sorted(side_files),
    }


def _float_config(folder: CheckpointFolder) -> dict[str, Any]:
    return {name: value for name, value in folder.config.items() if name != "quantization_config"}


def _float_tensors(
    folder: CheckpointFolder,
    layers: Mapping[str, StoredLayer],
    wanted: np.dtype | None,
    without: Collection[str] = (),
) -> list[TensorSource]:
    """All tensors of the float model, but for the keys in `without`."""
    by_key = {f"{name}.weight": layer for name, layer in layers.items()}
    expected = expected_tensors(models.abstract(_float_config(folder)))
    kept = [tensor for key, tensor in expected.items() if key not in without]
    return [_float_tensor(folder, tensor, by_key.get(tensor.key), wanted) for tensor in kept]


def _float_tensor(
    folder: CheckpointFolder, expected: Expected, layer: StoredLayer | None, wanted: np.dtype | None
) -> TensorSource:
    """One tensor of the float model, made from codes where `layer` is given."""
    key = expected.key
    found = folder.info(key).dtype if layer is None else np.dtype(np.float32)
    read = functools.partial(folder.read, key) if layer is None else layer.weight
    dtype = expected.cast_to(found, wanted)

    def make() -> np.ndarray:
        values = read()
        if not all_finite(values):
            raise nonfinite_error(str(folder.path), [key])
        with np.errstate(over="ignore"):  # told below, by name
            cast = values.astype(dtype, copy=False)
        if not all_finite(cast):
            remedy = "choose a type with a wider range (bfloat16)"
            raise UserError(f"{folder.path}: {key} overflows {dtype}", remedy=remedy)
        return cast

    return TensorSource(key, expected.shape, dtype, make)


def _original_config(config: Mapping[str, Any], layout: str) -> dict[str, Any]:
    return LAYOUTS[layout][1].original_config(models.parse_config(dict(config)).to_dict())


def _original(tensors: list[TensorSource], config: Mapping[str, Any], layout: str) -> list[TensorSource]:
    """The same tensors in a family's original layout, parts of one tensor put together."""
    whose, module = LAYOUTS[layout]
    if models.family_of(dict(config)).name != layout.removesuffix("-original"):
        raise UserError(f"only {whose} models have {whose}'s original layout", remedy="export to diffusers")
    keys = {tensor.name: module.to_original(tensor.name) for tensor in tensors}
    if lost := [name for name, key in keys.items() if key is None]:
        raise UserError(f"tensors have no name in {whose}'s original layout", remedy="export to diffusers", items=lost)
    shapes: dict[str, tuple[int, ...]] = {}
    for tensor in tensors:
        rows, *rest = tensor.shape
        before = shapes.get(keys[tensor.name], (0,))[0]
        shapes[keys[tensor.name]] = (before + rows, *rest)
    places = module.places(shapes)
    parts = {key: [t for t in tensors if keys[t.name] == key] for key in shapes}
    return [_joined(key, shape, [(part, places[part.name]) for part in parts[key]]) for key, shape in shapes.items()]


def _joined(key: str, shape: tuple[int, ...], parts: list[tuple[TensorSource, Place]]) -> TensorSource:
    """An original tensor of some tensors, in the widest of their types."""
    dtype = functools.reduce(np.promote_types, [part.dtype for part, _ in parts])

    def make() -> np.ndarray:
        whole = np.empty(shape, dtype)
        for part, place in parts:
            values, first = part.make(), 0
            for start, stop in place.rows or ((0, shape[0]),):
                whole[start:stop] = values[first : first + stop - start]
                first += stop - start
        return whole

    return TensorSource(key, shape, dtype, make)


def _compressed(
    folder: CheckpointFolder, layers: Mapping[str, StoredLayer], wanted: np.dtype | None
) -> tuple[list[TensorSource], dict[str, Any], dict[str, Any]]:
    """Tensors, config.json and what to report, in compressed-tensors' layout."""
    if not layers:
        raise UserError(f"{folder.path} is not quantized", remedy="quantize it first, or export to diffusers")
    compressed_tensors.refuse_transforms(layers.values())
    linear = {name: layer for name, layer in layers.items() if not layer.convolution}
    convolutions = {name: layer for name, layer in layers.items() if layer.convolution}
    # Everything but the weights of quantized linear layers is as in the float model.
    tensors = _float_tensors(folder, convolutions, wanted, without={f"{name}.weight" for name in linear})
    for layer in linear.values():
        tensors += compressed_tensors.layer_tensors(layer)
    floats = [name for names, _, _ in layers_of(models.skeleton(folder), (Linear,)) for name in names]
    config = _float_config(folder)
    config["quantization_config"] = compressed_tensors.quantization_config(linear.values(), floats)
    rounded = dataclasses.asdict(compressed_tensors.rounding(linear.values()))
    return tensors, config, {"dequantized": sorted(convolutions), "rounded_zero_points": rounded}
