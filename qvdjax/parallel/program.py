"""Reading the text of an optimized XLA program: which collectives which products it holds, how often."""

import dataclasses
import math
import re
from collections import defaultdict

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
)  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([^\s(]+) \(.*\{\s*$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?(\S+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|body|branch_computations|called_computations|true_computation|false_computation|to_apply)="
)
# Operations that leave no array of their own, and those that hand arrays on to computations of the same program.
_VIEWS = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "iota", "copy-done", "opt-barrier")
_HANDING = ("while", "conditional", "call", "async-start", "async-done")


@dataclasses.dataclass(frozen=True)
class Operation:
    """One line: `result` is the text of its shape, `rest` what follows the opening bracket."""

    name: str
    kind: str
    result: str
    rest: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the operands (they come before the first closing bracket)."""
        return re.findall(r"%([^\s,)]+)", self.rest.partition(")")[0])

    @property
    def channel(self) -> str | None:
        """Number of a collective's channel, its own; None without."""
        found = re.search(r"\bchannel_id=(\d+)", self.rest)
        return found.group(1) if found else None

    def attribute(self, name: str) -> list[str]:
        """Computations named by an attribute, alone or as a list in braces."""
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|%[^\s,]+)", self.rest)
        return re.findall(r"%([^\s,}]+)", found.group(1)) if found else []


class Program:
    """An optimized program (`compiled.as_text()`), with how often a run executes each operation.

    Loops count as often as they turn: by the compiler's `known_trip_count`, else by the bound of the loop's
    condition, counted from zero by ones as jax's scans do. A loop without either counts once, and
    `unknown_loops` says how many there are. Every branch of a conditional counts once. Numbers are of one
        device.
    """

    def __init__(self, text: str):
        self.computations: dict[str, list[Operation]] = {}
        self.unknown_loops = 0
        entry = self._parse(text)
        self.times: dict[str, float] = defaultdict(float)
        self._visit(entry, 1)

    def _parse(self, text: str) -> str:
        entry, operations = None, None
        for line in text.splitlines():
            if header := _HEADER.match(line):
                operations = self.computations.setdefault(header.group(2), [])
                entry = header.group(2) if header.group(1) else entry
            elif operations is not None and (match := _OPERATION.match(line)):
                root, name, result, kind, rest = match.groups()
                operations.append(Operation(name, kind, result, rest, root is not None))
        if entry is None:
            raise ValueError("the text holds no ENTRY computation")
        return entry

    def _visit(self, name: str, times: int) -> None:
        self.times[name] += times
        for operation in self.computations.get(name, ()):
            if operation.kind == "while":
                self._visit(operation.attribute("body")[0], times * self._turns(operation))
            else:
                for attribute in _CALLED.findall(operation.rest):
                    for called in operation.attribute(attribute[:-1]):
                        self._visit(called, times)

    def _turns(self, loop: Operation) -> int:
        known = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if known:
            return int(known.group(1))
        condition = self.computations.get(loop.attribute("condition")[0], [])
        root = next((o for o in condition if o.root), None)
        if root is not None and root.kind == "compare" and "direction=LT" in root.rest:
            bound = next((o for o in condition if o.name == root.operands[1]), None)
            value = re.match(r"(\d+)\)", bound.rest) if bound and bound.kind == "constant" else None
            if value:
                return int(value.group(1))
        self.unknown_loops += 1
        return 1

    def collectives(self) -> list[dict]:
        """What one device exchanges in one run: a row for each kind and type: `kind`, `dtype`,
        `bytes` and `count`.

        The bytes of one collective are those of its larger side on one device: the gathered array of an
        all-gather, the array before the reduction of a reduce-scatter, either side of the others. An
        all-reduce that the TPU compiler has fused with the slice after it (computations called
        all-reduce-scatter) is a reduce-scatter. One that it has spread over other work stands in several
        computations, also inside the loops of that work, and counts as often as it begins.
        """
        totals: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
        spread, counted = self._spread(), set()
        for name, operations in self.computations.items():
            shapes = {operation.name: operation.result for operation in operations}
            for operation in operations:
                kind = operation.kind.removesuffix("-start")
                if kind not in COLLECTIVES or self.times[name] == 0 or operation.channel in counted:
                    continue
                times = self.times[name]
                if operation.channel in spread:
                    times = spread[operation.channel]
                    counted.add(operation.channel)
                arrays = [array for o in operation.operands for array in _arrays(shapes.get(o, ""))]
                before = sum(_bytes(*array) for array in arrays)
                growth = max(1.0, _result_bytes(operation, kind) / before) if before else 1.0
                if name.startswith("all-reduce-scatter"):
                    kind = "reduce-scatter"
                for array in arrays:
                    total = totals[kind, array[0]]
                    total[0] += _bytes(*array) * growth * times
                    total[1] += times / len(arrays)
        rows = [
            {"kind": kind, "dtype": dtype, "bytes": round(size), "count": round(count)}
            for (kind, dtype), (size, count) in totals.items()
        ]
        return sorted(rows, key=lambda row: -row["bytes"])

    def _spread(self) -> dict[str, float]:
        """Channels of collectives that are spread over other work (async_collective_fusion), and how often they begin.

        Where they begin and end is outside the loops that they go on in.
        """
        places: dict[str, list[str]] = defaultdict(list)
        for name, operations in self.computations.items():
            for operation in operations:
                if operation.kind in COLLECTIVES and operation.channel and self.times[name]:
                    places[operation.channel].append(name)
        return {
            channel: min(self.times[name] for name in names)
            for channel, names in places.items()
            if any(name.startswith("async_collective_fusion") for name in names)
        }

    def written(self, dtype: str, least: int = 0) -> list[dict]:
        """Arrays of a type (as XLA spells it, such as "s32") that operations leave in memory: a row for each shape.

        What is made and used inside one fusion never lies in memory and does not count; nor do arguments, views and the
        loops that arrays are handed through. Each row: `shape`, `bytes` of one array, `count` of times it is written,
        and `operations`, what writes it.

        Args:
            least: Elements; smaller arrays are left out.
        """
        fused = {
            name for operations in self.computations.values() for o in operations
            if o.kind not in _HANDING for attribute in _CALLED.findall(o.rest) for name in o.attribute(attribute[:-1])
        }  # fmt: skip
        found: dict[tuple[int, ...], dict] = {}
        for name, operations in self.computations.items():
            if name in fused or not self.times[name]:
                continue
            for operation in operations:
                if operation.kind in _VIEWS or operation.kind in _HANDING:
                    continue
                for kind, shape in _arrays(operation.result):
                    if kind != dtype or math.prod(shape) < least:
                        continue
                    row = found.setdefault(
                        shape, {"shape": shape, "bytes": round(_bytes(kind, shape)), "count": 0, "operations": []}
                    )
                    row["count"] += round(self.times[name])
                    row["operations"].append(operation.name)
        return sorted(found.values(), key=lambda row: -row["bytes"] * row["count"])

    def estimated_cycles(self) -> int | None:
        """Cycles that the TPU compiler expects its operations to take, one after the other: its model of the chip, no
        timing. None where it says nothing. Kernels count as it was told, mostly for nothing; so do operations whose
        number it does not know, which it writes as the largest of 63 or 64 bits."""
        cycles = [
            int(found.group(1)) * self.times[name]
            for name, operations in self.computations.items() for o in operations
            if (found := re.search(r'"estimated_cycles":"(\d+)"', o.rest)) and int(found.group(1)) < 2**63 - 1
        ]  # fmt: skip
        return round(sum(cycles)) if cycles else None

    def products(self) -> list[dict]:
        """Matrix products by the types of their operands and result: `left`, `right`, `result`, `count`.

        On TPU a product appears as a convolution. Kernels are opaque and are not counted.
        """
        totals: dict[tuple[str, ...], float] = defaultdict(float)
        for name, operations in self.computations.items():
            shapes = {operation.name: operation.result for operation in operations}
            for operation in operations:
                if operation.kind in ("dot", "convolution") and self.times[name]:
                    operands = [_arrays(shapes[o])[0][0] for o in operation.operands[:2]]
                    totals[(*operands, _arrays(operation.result)[0][0])] += self.times[name]
        rows = [
            {"left": left, "right": right, "result": result, "count": round(count)}
            for (left, right, result), count in totals.items()
        ]
        return sorted(rows, key=lambda row: -row["count"])


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Types and dimensions of a shape or a tuple of shapes."""
    return [(dtype, tuple(int(d) for d in dimensions.split(",") if d)) for dtype, dimensions in _ARRAY.findall(shape)]


def _bytes(dtype: str, dimensions: tuple[int, ...]) -> float:
    bits = 8 if dtype == "pred" else 0 if dtype == "token" else int(re.search(r"\d+", dtype).group())
    return math.prod(dimensions) * bits / 8


def _result_bytes(operation: Operation, kind: str) -> float:
    arrays = _arrays(operation.result)
    if operation.kind.endswith("-start") and kind in ("all-gather", "collective-permute"):
        # The pair of operands and results, then counters.
        arrays = arrays[len(operation.operands) : 2 * len(operation.operands)]
    return sum(_bytes(*array) for array in arrays)
