"""What a safetensors file says it holds, checked before a single weight is read.

The format: eight bytes with the length of the header (little-endian), the header as JSON, then the tensors'
bytes without a gap (https://github.com/huggingface/safetensors, "Format").
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import ml_dtypes
import numpy as np

from qvdjax.errors import UserError

# The names of the format. Types narrower than a byte (F4, F6_*) have no NumPy counterpart of the same layout.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
        "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
        "F32": np.float32, "F64": np.float64, "C64": np.complex64, "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100_000_000  # the limit of the safetensors library itself

_AGAIN = "download or write the file again"


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: its name, shape, type, and the bytes [start, stop) of the file it fills."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class Header:
    """The checked header of a file: its tensors in the order of their bytes, and its metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike) -> Header:
    """Read and check the header of a safetensors file.

    Raises:
        UserError: The file is missing, unreadable, truncated or no safetensors file; its header lies about
            lengths or shapes; tensors overlap, leave a gap, or appear twice; a type is unknown.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return Header(*_parse(path, size, _header_bytes(path, size, file)))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist", remedy="check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, not a safetensors file", remedy="name the file") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", remedy="check the path") from None


def _header_bytes(path: Path, size: int, file) -> bytes:
    if size == 0:
        raise UserError(f"{path} is empty", remedy=_AGAIN)
    start = file.read(8)
    if len(start) < 8:
        raise UserError(f"{path} ends within its first eight bytes", remedy=_AGAIN)
    length = int.from_bytes(start, "little")
    # A pickle, a zip archive, HTML or a git-lfs pointer gives an absurd length: say which of the two it is.
    foreign = f"{path} is not a safetensors file (its first bytes are {start!r})"
    if length > HEADER_LIMIT or length < 2:
        raise UserError(foreign, remedy=_remedy(start))
    if 8 + length > size:
        if (remedy := _remedy(start)) != _AGAIN:
            raise UserError(foreign, remedy=remedy)
        what = f"its header needs {8 + length} bytes, the file has {size}"
        raise UserError(f"{path} is truncated: {what}", remedy=_AGAIN)
    text = file.read(length)
    if len(text) < length:
        raise UserError(f"{path} is truncated within its header", remedy=_AGAIN)
    if not text.startswith(b"{"):
        raise UserError(f"{path} is not a safetensors file (no JSON header)", remedy=_remedy(start))
    return text


def _remedy(start: bytes) -> str:
    # PyTorch writes zip archives or pickles; the byte after a pickle's version is an instruction, never zero.
    if start.startswith(b"PK\x03\x04") or (start[0] == 0x80 and start[1] in (2, 3, 4, 5) and start[2]):
        return "it looks like a PyTorch pickle: save it as safetensors first"
    if start.startswith(b"version "):
        return "it looks like a git-lfs pointer: fetch the real file with `git lfs pull`"
    return _AGAIN


def _unique(pairs: Iterable[tuple[str, object]]) -> dict:
    """A JSON object's pairs; a repeated name would otherwise silently keep only the last."""
    result = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"{name!r} appears twice")
        result[name] = value
    return result


def _parse(path: Path, size: int, text: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        json.dumps(header, ensure_ascii=False).encode()  # half a surrogate pair could never be printed
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise UserError(f"{path} has a corrupt header: {error}", remedy=_AGAIN) from None
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path} has a corrupt header: __metadata__ must map strings to strings", remedy=_AGAIN)
    base = 8 + len(text)
    tensors = sorted((_tensor(path, *item, base) for item in header.items()), key=lambda t: (t.start, t.stop))
    end = base
    for tensor in tensors:
        if tensor.start != end:
            kind = "overlaps the tensor before it" if tensor.start < end else "leaves a gap before it"
            raise UserError(f"{path}: {tensor.name} {kind} ({tensor.start - base} against {end - base})", remedy=_AGAIN)
        end = tensor.stop
    if end > size:
        raise UserError(f"{path} is truncated: its tensors need {end} bytes, the file has {size}", remedy=_AGAIN)
    if end < size:
        raise UserError(f"{path} holds {size - end} bytes that belong to no tensor", remedy=_AGAIN)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _tensor(path: Path, name: str, entry: object, base: int) -> TensorInfo:
    def corrupt(what: str) -> UserError:
        return UserError(f"{path}: {name} {what}", remedy=_AGAIN)

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise corrupt("must have exactly the fields dtype, shape and data_offsets")
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(
            f"{path}: {name} has the unknown type {entry['dtype']!r}", remedy=f"convert it to one of {known}"
        )
    shape, offsets = entry["shape"], entry["data_offsets"]
    for values, what in ((shape, "shape"), (offsets, "data_offsets")):
        # type() rather than isinstance: JSON's true is an int to Python.
        if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**63 for v in values):
            raise corrupt(f"has a corrupt {what} {str(values)[:80]}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise corrupt(f"has corrupt data_offsets {offsets}")
    dtype = DTYPES[entry["dtype"]]
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise corrupt(f"of shape {shape} and type {entry['dtype']} does not fill its {offsets[1] - offsets[0]} bytes")
    return TensorInfo(name, tuple(shape), dtype, base + offsets[0], base + offsets[1])
