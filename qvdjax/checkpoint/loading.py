"""Fill an abstract model from a folder, shard by shard, and write a model back, tensor by tensor."""

import dataclasses
import functools
import itertools
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.checkpoint.folder import CheckpointFolder, Progress, nonfinite_error, write_folder, writing_order
from qvdjax.checkpoint.safetensors_file import TensorSource, all_finite, cast_checked
from qvdjax.checkpoint.variables import (
    StoredVariable,
    check_tensors,
    expected_tensors,
    shape_key,
    stored_variables,
)
from qvdjax.errors import UserError
from qvdjax.numerics.packing import pack_bits, unpack_bits
from qvdjax.parallel.processes import to_host

# A shard up to this size is put together on the host and sent at once. A larger one is filled row by row on
# its device, because a host copy would double the memory of the largest stack on a CPU. That way compiles
# one small program a shape, which is not worth it for the many small vectors.
_STAGE_BYTES = 64 << 20


def load_variables(
    abstract_model: nnx.Module,
    folder: CheckpointFolder | str | os.PathLike,
    *,
    dtype: Any = None,
    shardings: Any = None,
    progress: Progress | None = None,
) -> nnx.Module:
    """A model like `abstract_model` with the weights of a folder.

    Each process reads only the shards of its own devices, one row of one shard at a time: beside the
    result, a few copies of the largest tensor of the file (one layer's, not a stack's) are in memory. Of one
    stack of int4 codes there are two copies for a moment; the largest variables are read first, when there is
    little else.

    Args:
        abstract_model: A VideoModel whose variables hold ShapeDtypeStructs (`jax.eval_shape`).
        folder: The folder, or its path.
        dtype: Floating type of the weights; None keeps each as it is in the file. Variables with the metadata
            `keep_float32` become no narrower than float32. Scales and other non-weights are never cast.
        shardings: None (first local device), one sharding for all, or a module of shardings shaped like the
            model.
        progress: Called with ("reading", bytes done, bytes in all) after each variable.

    Returns:
        The model; its variables hold arrays of the folder's values. JAX has no float64 unless it is
        switched on (JAX_ENABLE_X64): float64 files are then read as float32, with a warning.

    Raises:
        UserError: Unknown, missing, mis-shaped or mistyped tensors (all named in one error); NaN or infinite
            weights; weights that overflow `dtype`; whatever `CheckpointFolder.open` raises.
    """
    folder = folder if isinstance(folder, CheckpointFolder) else CheckpointFolder.open(folder)
    check_tensors(expected_tensors(abstract_model), {k: folder.info(k) for k in folder.keys}, str(folder.path))
    place = _placement(shardings)
    graphdef, state = nnx.split(abstract_model)
    stored = stored_variables(abstract_model)
    leaves, done, narrowed = {}, 0, []
    for one in sorted(stored, key=lambda one: -math.prod(one.value.shape)):
        wanted = _dtype_of(one, folder, dtype)
        if (kept := jax.dtypes.canonicalize_dtype(wanted)) != wanted:
            narrowed.append(one.names[0])
        try:
            array = _array(one, folder, kept, place(one.path))
        except _Nonfinite:
            # Read on, so that every such tensor is named rather than the first alone.
            names = [name for other in stored if not other.statistic for name in other.names]
            bad = [name for name in names if not all_finite(folder.read(name))]
            raise nonfinite_error(str(folder.path), bad) from None
        leaves[one.path] = one.variable.replace(array)
        done += sum(folder.info(name).nbytes for name in one.names)
        if progress:
            progress("reading", done, folder.nbytes)
    if narrowed:
        warnings.warn(
            f"{folder.path}: {len(narrowed)} float64 tensors ({narrowed[0]}, ...) are read as float32; "
            "set JAX_ENABLE_X64=1 to keep them",
            stacklevel=2,
        )
    return nnx.merge(graphdef, nnx.from_flat_state([(one.path, leaves[one.path]) for one in stored]))


def loaded_shapes(abstract_model: nnx.Module, folder: CheckpointFolder, *, dtype: Any = None) -> nnx.Module:
    """What `load_variables` would return, as shapes and types: no weight is read.

    Raises:
        UserError: Unknown, missing, mis-shaped or mistyped tensors.
    """
    check_tensors(expected_tensors(abstract_model), {k: folder.info(k) for k in folder.keys}, str(folder.path))
    graphdef, _ = nnx.split(abstract_model)
    leaves = []
    for one in stored_variables(abstract_model):
        kept = jax.dtypes.canonicalize_dtype(_dtype_of(one, folder, dtype))
        leaves.append((one.path, one.variable.replace(jax.ShapeDtypeStruct(one.value.shape, kept))))
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))


class _Nonfinite(Exception):
    """The tensor of this name holds NaN or infinity."""


def _placement(shardings: Any):
    """path -> sharding, from what the caller gave."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if isinstance(shardings, jax.sharding.Sharding):
        return lambda path: shardings
    by_path = {path: variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(shardings))}
    return by_path.__getitem__


def _dtype_of(one: StoredVariable, folder: CheckpointFolder, dtype: Any) -> np.dtype:
    """The type a variable gets in memory."""
    if one.codes:
        return np.dtype(one.value.dtype)
    # Rows of a stack share one array: where the file's types differ, the widest holds all of them exactly.
    found = functools.reduce(jnp.promote_types, (folder.info(name).dtype for name in one.names))
    return one.expected()[0].cast_to(np.dtype(found), None if dtype is None else np.dtype(dtype))


def _array(
    one: StoredVariable, folder: CheckpointFolder, dtype: np.dtype, sharding: jax.sharding.Sharding
) -> jax.Array:
    """One variable's array, laid out as `sharding` says."""
    shape = tuple(one.value.shape)
    parts: dict[jax.Device, jax.Array] = {}
    indices = sharding.addressable_devices_indices_map(shape)
    same: dict[tuple, list[jax.Device]] = {}
    for device, index in indices.items():
        same.setdefault(tuple(s.indices(n)[:2] for s, n in zip(index, shape)), []).append(device)
    for bounds, devices in same.items():
        index = tuple(slice(*b) for b in bounds)
        for device, part in zip(devices, _shard(one, folder, dtype, index, devices)):
            parts[device] = part
    return jax.make_array_from_single_device_arrays(shape, sharding, [parts[device] for device in indices])


def _shard(
    one: StoredVariable, folder: CheckpointFolder, dtype: np.dtype, index: tuple, devices: list
) -> list[jax.Array]:
    """The part of a variable that `index` names, once on each of `devices`."""
    if not one.stacked:
        row = _read_row(one, folder, one.names[0], index, dtype)
        return [jax.device_put(row, device) for device in devices]
    names, rest = one.names[index[0]], index[1:]
    shape = (len(names), *(s.stop - s.start for s in rest))
    if math.prod(shape) * dtype.itemsize <= _STAGE_BYTES:
        block = np.empty(shape, dtype)
        for i, name in enumerate(names):
            block[i] = _read_row(one, folder, name, rest, dtype)
        return [jax.device_put(block, device).block_until_ready() for device in devices]
    # XLA on a CPU replaces a row of int4 by writing the whole stack anew, code by code: such a stack is filled as
    # bytes of two codes each.
    pairs = dtype == jnp.int4 and shape[-1] % 2 == 0
    filled = ((*shape[:-1], shape[-1] // 2), np.uint8) if pairs else (shape, dtype)
    buffers = [
        jax.jit(
            functools.partial(jnp.zeros, *filled),
            out_shardings=jax.sharding.SingleDeviceSharding(device),
        )()
        for device in devices
    ]
    for i, name in enumerate(names):
        row = _read_row(one, folder, name, rest, np.int8 if pairs else dtype)
        row = _two_a_byte(row) if pairs else row
        buffers = [_put_row(b, jax.device_put(row, d), i).block_until_ready() for b, d in zip(buffers, devices)]
    return [_int4(b).block_until_ready() for b in buffers] if pairs else buffers


def _two_a_byte(codes: np.ndarray) -> np.ndarray:
    """int8 [..., in] of at most four bits -> uint8 [..., in / 2], the first of two codes in the low bits."""
    low, high = codes[..., 0::2].view(np.uint8), codes[..., 1::2].view(np.uint8)
    return low & np.uint8(15) | high << np.uint8(4)


@jax.jit
def _int4(pairs: jax.Array) -> jax.Array:
    """uint8 [..., in / 2] as `_two_a_byte` makes them -> int4 [..., in]."""
    codes = jax.lax.bitcast_convert_type(pairs, jnp.int4)  # [..., in / 2, 2]
    return codes.reshape(*pairs.shape[:-1], -1)


@functools.partial(jax.jit, donate_argnums=0)
def _put_row(stack: jax.Array, row: jax.Array, i: jax.Array) -> jax.Array:
    """stack [layers, ...] with row i replaced, in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, row, i, 0)


@jax.jit
def _row(stack: jax.Array, i: jax.Array) -> jax.Array:
    """stack [layers, ...] -> [...]."""
    return jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)


def _read_row(one: StoredVariable, folder: CheckpointFolder, name: str, index: tuple, dtype: np.dtype) -> np.ndarray:
    """A part of one tensor, unpacked, checked and cast."""
    if bits := one.packed_bits:
        stated = folder.read(shape_key(name)).tolist()
        if stated != list(one.row_shape):
            raise UserError(
                f"{folder.path}: {shape_key(name)} says {stated}, the model needs {list(one.row_shape)}",
                remedy="quantize the model again",
            )
        packed = folder.read(name, index[:1])
        codes = unpack_bits(packed, bits, math.prod(one.row_shape[1:]))  # [rows, width]
        codes = codes.reshape(-1, *one.row_shape[1:])  # [rows, width] -> [rows, ...]
        return codes[(slice(None), *index[1:])].astype(dtype)
    found = folder.read(name, index)
    if one.statistic:
        return found.astype(dtype, copy=False)
    if not all_finite(found):
        raise _Nonfinite(name)
    return cast_checked(found, dtype, f"{folder.path}: {name}")


def tensor_sources(model: nnx.Module) -> list[TensorSource]:
    """The tensors of a model's folder, each fetched from its device when its turn comes."""
    sources = []
    for one in stored_variables(model):
        for i, name in enumerate(one.names):
            dtype = np.dtype(one.value.dtype)
            fetch = functools.partial(_fetch, one, i)
            if bits := one.packed_bits:
                packed, shape = one.expected()[0], np.array(one.row_shape, np.int64)
                sources.append(TensorSource(name, packed.shape, packed.dtype, functools.partial(_packed, fetch, bits)))
                sources.append(TensorSource(shape_key(name), shape.shape, shape.dtype, lambda shape=shape: shape))
            else:
                sources.append(TensorSource(name, one.row_shape, np.dtype(np.int8) if one.codes else dtype, fetch))
    return sources


def _fetch(one: StoredVariable, i: int) -> np.ndarray:
    host = to_host(_row(one.value, i) if one.stacked else one.value)
    return host.astype(np.int8) if one.codes else host


def _packed(fetch, bits: int) -> np.ndarray:
    codes = fetch()
    return pack_bits(codes.reshape(len(codes), -1), bits)  # [out, ...] -> [out, width] -> [out, words]


def save_variables(
    model: nnx.Module,
    path: str | os.PathLike,
    config: Mapping,
    *,
    side_files: Mapping[str, Path | bytes] | None = None,
    metadata: Mapping[str, str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
):
    """Write a model as a folder: the inverse of `load_variables`, bit for bit.

    One row of one variable is fetched from its device at a time. With several processes all must call this
    (each row is gathered); the first one writes.

    Raises:
        UserError: See `write_folder`. Of several processes the first one raises it, when all rows are gathered.
    """
    sources = tensor_sources(model)
    if jax.process_count() == 1:
        write_folder(
            path, config, sources, side_files=side_files, metadata=metadata, overwrite=overwrite, progress=progress
        )
        return
    left = {tensor.name: tensor.make for tensor in itertools.chain.from_iterable(writing_order(sources))}
    try:
        if jax.process_index() == 0:
            gathered = [dataclasses.replace(one, make=lambda name=one.name: left.pop(name)()) for one in sources]
            write_folder(
                path, config, gathered, side_files=side_files, metadata=metadata, overwrite=overwrite,
                progress=progress,
            )  # fmt: skip
    finally:
        # The others take part in every gather, and the first one does so too when it cannot write any more.
        for make in left.values():
            make()
