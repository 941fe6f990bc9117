"""Intervals of timesteps, in each of which a layer is quantized on its own."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from qvdjax.nn.input_clip import TIMESTEPS


@dataclasses.dataclass(frozen=True)
class TimestepIntervals:
    """The timesteps from 0 to 1000, cut.

    Attributes:
        ends: Of every interval but the last, ascending; an end belongs to the interval that it ends.
    """

    ends: tuple[float, ...]

    def __post_init__(self):
        if not self.ends or list(self.ends) != sorted(set(self.ends)) or not all(map(math.isfinite, self.ends)):
            raise ValueError(f"intervals end at finite timesteps, each above the one before, not at {self.ends}")

    @classmethod
    def alike(cls, count: int) -> "TimestepIntervals":
        """So many of one length; two are [0, 500] and (500, 1000]."""
        if count < 2:
            raise ValueError(f"timesteps are cut in at least two intervals, not {count}")
        return cls(tuple(TIMESTEPS * number / count for number in range(1, count)))

    @classmethod
    def from_dict(cls, fields: Mapping) -> "TimestepIntervals":
        """Inverse of `dataclasses.asdict`, also behind JSON."""
        return cls(tuple(map(float, fields["ends"])))

    def __len__(self) -> int:
        return len(self.ends) + 1

    def of(self, timestep: jax.Array) -> jax.Array:
        """timestep (batch,) -> the number of each sample's interval, int32 (batch,)."""
        return (timestep[:, None] > jnp.asarray(self.ends)).sum(axis=1, dtype=jnp.int32)  # batch ends -> batch

    def name(self, number: int) -> str:
        """An interval in words."""
        edges = ("0", *(f"{end:g}" for end in self.ends), str(TIMESTEPS))
        return f"{edges[number]} to {edges[number + 1]}"
