"""Safetensors files, read and written one tensor at a time, without PyTorch."""

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Self

import numpy as np

from qvdjax.checkpoint.atomic import disk_errors
from qvdjax.checkpoint.header import DTYPES, NAMES, read_header
from qvdjax.errors import UserError

# Exponent bits, all set in infinities and NaNs. float8_e4m3fn has no infinity and e8m0fnu no sign: their
# NaN is a whole pattern.
_NONFINITE = {
    "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80), "F32": (np.uint32, 0x7F800000),
    "F64": (np.uint64, 0x7FF0000000000000), "C64": (np.uint32, 0x7F800000), "F8_E5M2": (np.uint8, 0x7C),
    "F8_E4M3": (np.uint8, 0x7F), "F8_E8M0": (np.uint8, 0xFF),
}  # fmt: skip
_CHECK_AT_A_TIME = 1 << 22  # elements; bounds the masks to a few megabytes


def is_floating(dtype: np.dtype) -> bool:
    """Whether a type is a real floating type, NumPy's or ml_dtypes'."""
    return NAMES.get(np.dtype(dtype), "").startswith(("F", "BF"))


def floating_dtype(name: str | np.dtype | type) -> np.dtype:
    """The floating type that a user names ("bfloat16", or the format's own "BF16").

    Raises:
        UserError: There is no such floating type.
    """
    if isinstance(name, str) and name.upper() in DTYPES:
        name = DTYPES[name.upper()]
    try:
        dtype = np.dtype(name)
    except TypeError:
        dtype = None
    if dtype is None or not is_floating(dtype):
        known = ", ".join(str(known) for known in NAMES if is_floating(known))
        raise UserError(f"{name!r} is no floating type", remedy=f"choose one of {known}")
    return dtype


def all_finite(array: np.ndarray) -> bool:
    """Whether an array holds no NaN and no infinity.

    Read from the bits, which takes half the time of `np.isfinite` on bfloat16. True for types that hold
    neither.
    """
    kind = _NONFINITE.get(NAMES.get(array.dtype, ""))
    if kind is None:
        return True
    unsigned, mask = kind
    bits = np.ascontiguousarray(array).reshape(-1).view(unsigned)  # any shape -> [elements]
    mask = unsigned(mask)
    return not any(
        ((bits[start : start + _CHECK_AT_A_TIME] & mask) == mask).any()
        for start in range(0, bits.size, _CHECK_AT_A_TIME)
    )


class SafetensorsFile:
    """A checked safetensors file. Reading a tensor opens and closes it, so that no mapped page stays
    resident.

    Attributes:
        path: The file.
        tensors: name -> TensorInfo, in the order of their bytes.
        metadata: The header's own strings.
    """

    def __init__(self, path: str | os.PathLike):
        """Read and check the header.

        Raises:
            UserError: See `read_header`.
        """
        self.path = Path(path)
        header = read_header(self.path)
        self.tensors, self.metadata = header.tensors, header.metadata

    def read(self, name: str, index: tuple[slice, ...] = ()) -> np.ndarray:
        """One tensor, or the part of it that `index` (slices of step one, leading axes first) names.

        Raises:
            UserError: The file has no such tensor, or can no longer be read.
        """
        if name not in self.tensors:
            raise UserError(f"{self.path} holds no tensor {name}", remedy="check the name with `qvdjax info`")
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.empty(info.shape, info.dtype)[index]
        try:
            # By the header that was checked: the safetensors library parses it again for every tensor that it is
            # opened for, which took most of the time of loading a UNet's thousands.
            return np.array(np.memmap(self.path, info.dtype, "r", info.start, info.shape)[index])
        except (ValueError, OSError) as error:
            raise UserError(f"{self.path}: {name} cannot be read: {error}", remedy="was the file changed?") from None


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """A tensor to be written: what the header must know beforehand, and a function that makes the values.

    `make` is called once, when the tensor's turn comes, and its result is dropped after writing.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


def aligned(tensors: Iterable[TensorSource]) -> list[TensorSource]:
    """Tensors in the order of a file: widest type first, so that each starts at a multiple of its width."""
    return sorted(tensors, key=lambda tensor: -np.dtype(tensor.dtype).itemsize)


class SafetensorsWriter:
    """Writes one tensor at a time under a temporary name; the file gets its own name when all are written.

    Memory is bounded by the largest tensor. Use as a context manager; leaving it by an exception removes the
    temporary file.
    """

    def __init__(self, path: str | os.PathLike, tensors: Iterable[TensorSource], metadata: Mapping[str, str]):
        """Plan the file: its tensors lie as `aligned` says.

        Raises:
            UserError: Two tensors have one name, or a type has no place in the format.
        """
        self.path = Path(path)
        self._temporary = self.path.with_name(f".{self.path.name}.partial-{os.getpid()}")
        self.tensors = aligned(tensors)
        entries, offset = {"__metadata__": dict(metadata)} if metadata else {}, 0
        for tensor in self.tensors:
            if tensor.name in entries:
                raise UserError(f"two tensors are called {tensor.name}", remedy="give each its own name")
            if np.dtype(tensor.dtype) not in NAMES:
                raise UserError(f"{tensor.name} has type {tensor.dtype}, which safetensors lacks", remedy="cast it")
            stop = offset + tensor.nbytes
            shape, dtype = [int(n) for n in tensor.shape], NAMES[np.dtype(tensor.dtype)]
            entries[tensor.name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, stop]}
            offset = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the format's own alignment of the data
        self._head = len(text).to_bytes(8, "little") + text
        self.nbytes = len(self._head) + offset

    def __enter__(self) -> Self:
        with disk_errors(self.path):
            self._file = self._temporary.open("wb")
            self._file.write(self._head)
        return self

    def write(self, tensor: TensorSource):
        """Make a tensor and append it; call once for each of `tensors`, in that order.

        Raises:
            UserError: The disk is full or the target unwritable.
            ValueError: `make` returned another shape or type than announced.
        """
        values = np.asarray(tensor.make())
        if values.shape != tuple(tensor.shape) or values.dtype != np.dtype(tensor.dtype):
            raise ValueError(
                f"{tensor.name}: announced {tensor.dtype}{tensor.shape}, made {values.dtype}{values.shape}"
            )
        octets = np.ascontiguousarray(values).reshape(-1).view(np.uint8)  # any shape -> [bytes]
        with disk_errors(self.path):
            self._file.write(octets.data)

    def __exit__(self, kind, error, trace):
        try:
            if kind is None:
                with disk_errors(self.path):
                    # A full disk may only be noticed when the last bytes really reach it.
                    self._file.flush()
                    os.fsync(self._file.fileno())
                    self._file.close()
                    if self._temporary.stat().st_size != self.nbytes:
                        raise ValueError(f"{self.path}: not every announced tensor was written")
                    os.replace(self._temporary, self.path)
        finally:
            # Closing flushes what is left and fails once more on a full disk; the first error is the one
            # to show.
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)


def write_file(path: str | os.PathLike, tensors: Iterable[TensorSource], metadata: Mapping[str, str] | None = None):
    """Write a safetensors file, one tensor at a time.

    `format: pt` is added to the metadata: PyTorch's readers ask for it.

    Raises:
        UserError: The disk is full or the target unwritable.
    """
    with SafetensorsWriter(path, tensors, {"format": "pt", **(metadata or {})}) as writer:
        for tensor in writer.tensors:
            writer.write(tensor)


def cast_checked(values: np.ndarray, dtype: np.dtype, where: str) -> np.ndarray:
    """Finite values in another floating type.

    Raises:
        UserError: They overflow it; `where` names the folder and the tensor.
    """
    with np.errstate(over="ignore"):  # told below, by name
        cast = values.astype(dtype, copy=False)
    if cast.dtype != values.dtype and not all_finite(cast):
        raise UserError(f"{where} overflows {dtype}", remedy="choose a type with a wider range (bfloat16)")
    return cast
