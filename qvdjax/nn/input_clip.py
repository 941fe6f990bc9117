"""Clips of a dynamic input range: by how much it is narrowed, alike for all timesteps or by timestep."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from qvdjax.errors import UserError

TIMESTEPS = 1000


@dataclasses.dataclass(frozen=True)
class InputClip:
    """How the dynamic range of an input is narrowed: [low, high] becomes [low * c_low, high * c_high].

    The factors stand in a table [count, sides]: sides is 1 for a symmetric range, 2 (low, high) for an asymmetric one.
    They are learned in training and constants afterwards. Which row a sample uses follows from its own timestep.

    Attributes:
        index: "one": the same row always. "bins": row floor(timestep * count / 1000), a bin of noise levels.
            "residue": row floor(timestep) mod count, as QVGen's released code has it (ModelTC/QVGen,
            `training/quant/quant.py`). That code takes the timestep of the first sample for the whole batch, and
            counts calls when sampling; neither is copied here.
        count: Rows; 1 for "one". The release has 50.
        ratio: Constant factor beside the learned one (the release: 0.95).
        start: What the learned factor starts at, in (0, 1) (the release: 0.95, so 0.9025 in all).
    """

    index: Literal["one", "bins", "residue"] = "one"
    count: int = 1
    ratio: float = 0.95
    start: float = 0.95

    def __post_init__(self):
        if self.index not in ("one", "bins", "residue"):
            raise ValueError(f"unknown index {self.index!r}: use 'one', 'bins' or 'residue'")
        if self.count < 1 or (self.index == "one" and self.count != 1):
            raise ValueError(f"an input clip by {self.index!r} cannot have {self.count} rows")
        if not (0 < self.start < 1 and self.ratio > 0):
            raise ValueError(f"start {self.start} must lie between 0 and 1, and ratio {self.ratio} be positive")

    @property
    def reads_timestep(self) -> bool:
        """Whether the row depends on the timestep."""
        return self.count > 1

    def rows(self, timestep: jax.Array) -> jax.Array:
        """timestep (batch,) in 0..1000 -> rows of the table, int32 (batch,)."""
        if self.index == "residue":
            return jnp.floor(timestep).astype(jnp.int32) % self.count
        bins = jnp.floor(timestep * self.count / TIMESTEPS).astype(jnp.int32)
        return jnp.clip(bins, 0, self.count - 1)

    def start_table(self, symmetric: bool) -> jax.Array:
        """The factors before any training, float32 [count, sides]."""
        return jnp.full((self.count, 1 if symmetric else 2), self.ratio * self.start, jnp.float32)

    def factors(self, table: jax.Array, timestep: jax.Array | None, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The factors of the low and the high end for an input, each [batch or 1, 1, ...] with as many axes as x.

        Args:
            table: [count, sides].
            timestep: (batch,), one a sample; None where the table has one row.
            x: [rows, ..., in]; rows is the batch, or a multiple of it with the batch outermost (frames folded into it).

        Raises:
            UserError: x has rows that do not divide among the samples.
        """
        if not self.reads_timestep:
            chosen = table  # [1, sides]
        else:
            chosen = table[self.rows(timestep)]  # [batch, sides]
            repeats, rest = divmod(x.shape[0], timestep.shape[0])
            if rest:
                raise UserError(
                    f"{x.shape[0]} rows of input do not divide among {timestep.shape[0]} timesteps",
                    remedy="give one timestep a sample, or an input clip that does not depend on it",
                )
            chosen = jnp.repeat(chosen, repeats, axis=0)  # [batch, sides] -> [(batch repeats), sides]
        low, high = chosen[:, 0], chosen[:, -1]
        shape = (-1, *[1] * (x.ndim - 1))
        return low.reshape(shape), high.reshape(shape)  # [rows or 1] -> [rows or 1, 1, ...]
