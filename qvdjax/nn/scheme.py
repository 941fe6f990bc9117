"""What a layer becomes: the decision that a recipe takes for each layer, as data."""

import dataclasses
import math
from typing import Literal

from qvdjax.errors import UserError
from qvdjax.kernels.attention_preparation import check_codebook
from qvdjax.nn.bit_switch import BitSwitch
from qvdjax.nn.centering import Centering
from qvdjax.nn.input_clip import InputClip
from qvdjax.nn.low_rank import LowRank
from qvdjax.nn.timestep_intervals import TimestepIntervals
from qvdjax.nn.token_estimator import TokenEstimator
from qvdjax.nn.transforms import Kronecker, Rotation, check_transforms
from qvdjax.numerics import FeatureGrid, Quantizer

Execution = Literal["simulate", "integer"]
EXECUTIONS = ("simulate", "integer")

Role = Literal[
    "embedder", "time", "modulation", "temporal_feature", "query", "key", "value", "attention", "attention_output",
    "feed_forward_in", "feed_forward_out", "projection", "convolution", "head",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LayerScheme:
    """How one layer is quantized; nothing at all for a layer that stays float.

    Attributes:
        weight: Quantizer of the weight, None for a float weight.
        activation: Quantizer of the layer's input, None for a float input.
        transforms: Names of what the input passes through before it is quantized (see `qvdjax.nn.transforms`); the
            weight has been changed to make up for it.
        reason: Why, in words, for the table that users read.
        input_clip: How the dynamic range of the input is narrowed, None for not at all.
        rotation: How the transform "rotation" rotates, None without it.
        kronecker: How the transform "kronecker" is cut in two, None without it.
        low_rank: The branch in full precision beside the product, None for none. What it leaves is quantized.
        feature_grid: The grid of an input that is the timestep's alone, in the place of `activation`, None for none.
            Its levels are the layer's own, and the product is of floats.
        estimator: The learned estimate that is added to the product, None for none.
        split: Channels of each part of a convolution's input that has ranges of its own, of the input and of the weight
            (Q-Diffusion's split shortcut), None for one in all.
        switch: At which timesteps the input has more bits than `activation` says, None for none.
        centering: How what the tokens of an input have in common is rounded apart from them, None for not at all.
        timestep_intervals: Of timesteps in each of which the layer is quantized on its own, None for one in all.
        shift_timesteps: Those that have shifts of their own, where the transform "shift" is of timesteps, else None.
    """

    weight: Quantizer | None = None
    activation: Quantizer | None = None
    transforms: tuple[str, ...] = ()
    reason: str = ""
    input_clip: InputClip | None = None
    rotation: Rotation | None = None
    low_rank: LowRank | None = None
    kronecker: Kronecker | None = None
    feature_grid: FeatureGrid | None = None
    estimator: TokenEstimator | None = None
    split: tuple[int, ...] | None = None
    switch: BitSwitch | None = None
    centering: Centering | None = None
    timestep_intervals: TimestepIntervals | None = None
    shift_timesteps: tuple[float, ...] | None = None

    def __post_init__(self):
        check_transforms(self.transforms, self.rotation, self.kronecker)
        if self.input_clip is not None and not (self.activation is not None and self.activation.dynamic):
            raise ValueError("an input clip belongs to a dynamic activation quantizer")
        if self.low_rank is not None and self.weight is None:
            raise ValueError("a low-rank branch belongs to a quantized weight")
        if self.estimator is not None and self.weight is None:
            raise ValueError("an estimate of what rounding takes off belongs to a quantized weight")
        if self.feature_grid is not None and self.activation is not None:
            raise ValueError("an input has a quantizer or a feature grid, not both")
        if self.split is not None and self.activation is not None and self.activation.granularity != "tensor":
            raise ValueError("parts of an input have one range each")
        if self.switch is not None and not (self.activation is not None and self.activation.dynamic):
            raise ValueError("bits are switched of an input with a dynamic range")
        if self.centering is not None and not (self.activation is not None and self.activation.dynamic):
            raise ValueError("the tokens of an input with a dynamic range are centred")
        if self.switch is not None and self.activation.codebook is not None:
            raise ValueError("an input with a codebook has the same bits at all timesteps")
        if self.shift_timesteps is not None and ("shift" not in self.transforms or not self.shift_timesteps):
            raise ValueError("timesteps have shifts where an input is shifted, and there is one at least")

    def check_width(self, width: int) -> None:
        """UserError where groups of the weight or the input, or a Kronecker factor, do not divide a layer's width."""
        if self.kronecker is not None:
            self.kronecker.sizes_of(width)
        weight, inputs = (None if q is None else q.group_size for q in (self.weight, self.activation))
        for name, size in (("group_size", weight), ("activation_group_size", inputs)):
            if size and width % size:
                raise UserError(f"{name} {size} does not divide a width of {width}", remedy="choose a divisor")
        if weight and inputs and weight != inputs:
            raise UserError(
                f"group_size {weight} and activation_group_size {inputs} differ",
                remedy="group both alike, or one alone",
            )

    @property
    def quantizes(self) -> bool:
        """Whether anything about the layer is quantized."""
        return any(part is not None for part in (self.weight, self.activation, self.feature_grid))

    def to_dict(self) -> dict:
        """Plain fields, for a config file."""
        fields = dataclasses.asdict(self)
        for name in (*_OPTIONAL, "split", "switch", "timestep_intervals", "shift_timesteps"):
            if fields[name] is None:
                del fields[name]  # folders without one stay readable by programs that do not know it
        for name in ("weight", "activation"):
            for part in ("frames", "timesteps"):
                if fields[name] is not None and fields[name][part] is None:
                    del fields[name][part]  # likewise
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> "LayerScheme":
        """Inverse of `to_dict`; raises TypeError or ValueError on unknown fields or values."""
        quantizers = {
            name: None if fields.get(name) is None else _quantizer(fields[name]) for name in ("weight", "activation")
        }
        rest = {name: kind(**fields[name]) for name, kind in _OPTIONAL.items() if fields.get(name) is not None}
        tuples = {name: tuple(fields[name]) for name in ("transforms", "split") if fields.get(name) is not None}
        for name, kind in (("switch", BitSwitch), ("timestep_intervals", TimestepIntervals)):
            if fields.get(name) is not None:
                rest[name] = kind.from_dict(fields[name])
        if fields.get("shift_timesteps") is not None:
            rest["shift_timesteps"] = tuple(map(float, fields["shift_timesteps"]))
        return cls(**{**fields, **quantizers, **rest, **tuples})


def _quantizer(fields: dict) -> Quantizer:
    timesteps = fields.get("timesteps")
    return Quantizer(**{**fields, "timesteps": None if timesteps is None else tuple(map(float, timesteps))})


_OPTIONAL = {
    "input_clip": InputClip, "rotation": Rotation, "low_rank": LowRank, "kronecker": Kronecker,
    "feature_grid": FeatureGrid, "estimator": TokenEstimator, "centering": Centering,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class AttentionScheme:
    """How the two products of an attention are quantized, and nothing of its projections.

    Attributes:
        qk_bits: Bits of queries and keys (one symmetric range a token and head), None for float.
        pv_bits: Bits of probabilities (an unsigned range for those of a query and `pv_block` neighbouring keys, from 0
            to their largest) and values (one range a channel), None for float.
        smooth_key: Subtract the mean key over tokens first, which leaves the softmax unchanged and takes away
            the channel offsets that waste the range (SageAttention, arXiv 2410.02367 section 3.1).
        reason: Why, in words.
        key_block: So many neighbouring keys of a head share a range, None for a range each.
        pv_block: See `pv_bits`; None for all keys of a query.
        codebook: "float8_e4m3fn" for float8 in the place of integers, of 8 bits.
    """

    qk_bits: int | None = None
    pv_bits: int | None = None
    smooth_key: bool = True
    reason: str = ""
    key_block: int | None = None
    # No step is coarser than with one range a query, and one pass over the keys knows the largest of a block.
    pv_block: int | None = 512
    codebook: str | None = None

    def __post_init__(self):
        check_codebook(self.codebook, self.qk_bits, self.pv_bits)
        for name, size in (("key_block", self.key_block), ("pv_block", self.pv_block)):
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, not {size}")

    def to_dict(self) -> dict:
        """Plain fields, for a config file."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class TableScheme:
    """A layer that sees the timestep alone is a table of its outputs (`qvdjax.nn.timestep_table`).

    Attributes:
        timesteps: Of the rows, each once.
        sampler: The sampler that visits them, in words; "" where nobody said.
        replaced_bytes: What the layer in whose place the table stands took in one block, codes at their logical bits.
    """

    timesteps: tuple[float, ...]
    sampler: str = ""
    replaced_bytes: int = 0

    def __post_init__(self):
        if not self.timesteps or not all(math.isfinite(timestep) for timestep in self.timesteps):
            raise ValueError("a table needs timesteps that are finite")

    @property
    def same(self) -> float:
        """Timesteps nearer than this are one: float32 rounds them to a hundredth of it, and two steps of a sampler lie
        further apart."""
        return 1e-5 * max(1.0, *map(abs, self.timesteps))

    @property
    def reason(self) -> str:
        """Why, in words."""
        return f"it sees the timestep alone: a table over {len(self.timesteps)} steps"

    def to_dict(self) -> dict:
        """Plain fields, for a config file."""
        return {**dataclasses.asdict(self), "timesteps": list(self.timesteps)}

    @classmethod
    def from_dict(cls, fields: dict) -> "TableScheme":
        """Inverse of `to_dict`; raises TypeError, KeyError or ValueError on unknown fields or values."""
        return cls(**{**fields, "timesteps": tuple(map(float, fields["timesteps"]))})
