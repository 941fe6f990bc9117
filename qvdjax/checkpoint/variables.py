"""The mapping between a model's variables and the tensors of a folder.

A variable's attribute path is its diffusers key. Blocks of one kind are stacked: inside a stack, row i of the
leading axis is the tensor of block number `start + i` (`Stack.names`). The codes of a quantized layer are
`weight` (int8) at eight bits and below that `weight_packed` (a bit stream a row, see
`qvdjax.numerics.packing`) together with `weight_shape`.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from qvdjax.checkpoint.safetensors_file import is_floating
from qvdjax.errors import UserError
from qvdjax.nn.variables import Statistic, dotted
from qvdjax.numerics.packing import packed_width


@dataclasses.dataclass(frozen=True)
class Expected:
    """A tensor that a model's folder must hold.

    Attributes:
        key: Its name in the folder.
        shape: Its shape there.
        dtype: Its type there; any floating type will do where this is one.
        parameter: Whether it is a weight, which a caller may ask for in another floating type.
        keep_float32: Whether it must not become narrower than float32 when the others do.
    """

    key: str
    shape: tuple[int, ...]
    dtype: np.dtype
    parameter: bool = False
    keep_float32: bool = False

    def cast_to(self, found: np.dtype, wanted: np.dtype | None) -> np.dtype:
        """The type a tensor found as `found` gets when the caller asked for `wanted` (None: as found)."""
        if wanted is None or not self.parameter or not is_floating(found):
            return np.dtype(found)
        return np.promote_types(wanted, np.float32) if self.keep_float32 else np.dtype(wanted)


@dataclasses.dataclass(frozen=True)
class StoredVariable:
    """One variable of a model and where its rows lie in a folder.

    Attributes:
        path: Attribute path in the model.
        variable: The variable, holding an array or a ShapeDtypeStruct.
        names: Its key in the folder, one a row where `stacked`, else a single one.
        stacked: Whether the leading axis counts layers.
        codes: Whether it holds the codes of a quantized layer.
    """

    path: tuple
    variable: nnx.Variable
    names: tuple[str, ...]
    stacked: bool
    codes: bool

    @property
    def value(self) -> Any:
        """The array or ShapeDtypeStruct, with the layer axis where there is one."""
        return self.variable.get_value()

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of one row: of one layer's tensor."""
        return tuple(self.value.shape[1:] if self.stacked else self.value.shape)

    @property
    def statistic(self) -> bool:
        """Whether it only reports on a layer, and may thus be infinite."""
        return isinstance(self.variable, Statistic)

    @property
    def packed_bits(self) -> int | None:
        """Bits a code where the tensor is a bit stream."""
        bits = self.variable.get_metadata()["bits"] if self.codes else 8
        return bits if bits < 8 else None

    def expected(self) -> list[Expected]:
        """What the folder must hold: for each row a tensor, and its `weight_shape` where it is packed."""
        dtype = np.dtype(self.value.dtype)
        if bits := self.packed_bits:
            rows, *rest = self.row_shape
            shape = (rows, packed_width(math.prod(rest), bits))
            shapes = [Expected(shape_key(name), (len(self.row_shape),), np.dtype(np.int64)) for name in self.names]
            return [Expected(name, shape, np.dtype(np.int32)) for name in self.names] + shapes
        if self.codes:
            dtype = np.dtype(np.int8)
        keep = bool(self.variable.get_metadata().get("keep_float32", False))
        parameter = isinstance(self.variable, nnx.Param) and is_floating(dtype)
        return [Expected(name, self.row_shape, dtype, parameter, keep) for name in self.names]


def shape_key(packed_key: str) -> str:
    """`layer.weight_packed` -> `layer.weight_shape`."""
    return packed_key.removesuffix("weight_packed") + "weight_shape"


def stored_variables(model: nnx.Module) -> list[StoredVariable]:
    """Every variable of a model, concrete or abstract, with its place in a folder.

    Raises:
        ValueError: Two variables would have one key.
    """
    stored = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        codes = path[-1] == "codes" and "bits" in variable.get_metadata()
        name = path
        if codes:
            name = (*path[:-1], "weight" if variable.get_metadata()["bits"] == 8 else "weight_packed")
        # "stacks", number, "block", then the path inside the block
        stack = model.stacks[path[1]] if path[0] == "stacks" else None
        names = (dotted(name),) if stack is None else tuple(stack.names(name[3:]))
        stacked = stack is not None and stack.count is not None
        stored.append(StoredVariable(path, variable, names, stacked, codes))
    counts = collections.Counter(name for one in stored for name in one.names)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"several variables are stored as {twice[:3]}")
    return stored


def expected_tensors(model: nnx.Module) -> dict[str, Expected]:
    """key -> what a folder of this model must hold; the model may be abstract."""
    return {tensor.key: tensor for one in stored_variables(model) for tensor in one.expected()}


def check_tensors(expected: Mapping[str, Expected], found: Mapping[str, Any], where: str):
    """Compare what a model needs with what was found.

    Args:
        expected: key -> Expected.
        found: key -> anything with `shape` and `dtype`.
        where: The folder or file, for the message.

    Raises:
        UserError: Unknown, missing, mis-shaped or mistyped keys, all of them in one error. A weight whose two
            axes are exchanged is called transposed; a square one cannot be told from a right one.
    """
    missing = [f"{key} (missing)" for key in expected if key not in found]
    unknown = [f"{key} (unknown)" for key in found if key not in expected]
    wrong = [f"{k} ({why})" for k, e in expected.items() if k in found and (why := _mismatch(e, found[k]))]
    if not (missing or unknown or wrong):
        return
    counts = [f"{len(names)} {what}" for names, what in _kinds(missing, unknown, wrong) if names]
    # The first of each kind come first, because only three names are shown.
    kinds = [names for names, _ in _kinds(missing, unknown, wrong)]
    items = [names[0] for names in kinds if names] + [name for names in kinds for name in names[1:]]
    raise UserError(
        f"{where} does not fit the model its config describes: {', '.join(counts)}",
        remedy="check config.json, or bring the checkpoint into diffusers' layout with `qvdjax convert`",
        items=items,
    )


def _kinds(missing: list, unknown: list, wrong: list) -> Iterable[tuple[list, str]]:
    return (missing, "missing"), (unknown, "unknown"), (wrong, "of the wrong shape or type")


def _mismatch(expected: Expected, found: Any) -> str | None:
    shape, wanted = tuple(found.shape), expected.shape
    if shape != wanted:
        hint = ", it appears to be transposed" if len(shape) == 2 and shape == wanted[::-1] else ""
        return f"shape {list(shape)} instead of {list(wanted)}{hint}"
    if is_floating(found.dtype) and is_floating(expected.dtype):
        return None
    if np.dtype(found.dtype) != expected.dtype:
        wanted = "a floating type" if is_floating(expected.dtype) else expected.dtype
        return f"{np.dtype(found.dtype)} instead of {wanted}"
    return None


def parameter_count(model: nnx.Module) -> int:
    """Number of weights of a model, codes counted as weights, quantization parameters and low-rank branches not, and
    once where intervals of timesteps have codes of their own: the same for a model in full precision and for what any
    recipe makes of it."""
    return sum(
        math.prod(one.value.shape)
        for one in stored_variables(model)
        if (one.codes or (isinstance(one.variable, nnx.Param) and "low_rank" not in one.path))
        and not _of_later_interval(one.path)
    )


def _of_later_interval(path: tuple) -> bool:
    """Whether a variable is one of several for one layer (`qvdjax.nn.IntervalLinear`), and not the first."""
    return "intervals" in path and path[path.index("intervals") + 1] > 0
