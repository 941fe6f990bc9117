"""Grids of few values for the temporal features of a UNet, uniform and logarithmic (QVD's HTDQ)."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from qvdjax.numerics.grid import BITS, Grid

Kind = Literal["symmetric", "asymmetric", "log2", "log", "mixed"]
# Where the mixed grid may change from logarithmic to uniform, as shares of the largest value. The authors' search goes
# from 0.5 to 4.42 in 101 steps, and 4.42 is the largest value of their features.
_SPLITS = 101
_LEAST_SPLIT = 0.5 / 4.421875


@dataclasses.dataclass(frozen=True)
class FeatureGrid:
    """The values that a rounded temporal feature may take: `levels`, ascending, and the `edges` between them.

    A temporal feature is the vector f(t) that the time embedding gives the ResNet blocks. It depends on the timestep
    alone, so that a sampler meets as many as it has steps. Most of its numbers lie just below zero (SiLU), a few are
    large: a uniform grid then gives neighbouring timesteps the same codes, and they can no longer be told apart
    (QVD, arXiv 2407.11585). Since one vector a step costs nothing, it is multiplied as floats, whatever the grid.

    Read in PaddleSlim `example/QVD/QDrop/quant/{Qlog,Qlog_debug}.py`; the paper's own equations were not at hand.

    Attributes:
        kind: "symmetric", "asymmetric": uniform grids over the whole range (`qvdjax.numerics.Grid`).
            "log2": as released. Powers of two times the largest magnitude, 2**bits of them, with a sign beside the
            code, so that it takes one bit more than it says.
            "log": as many codes as the bits have, one of them zero; powers of 2**(1 / steps) times the largest
            magnitude.
            "mixed": logarithmic up to a split, uniform above, half of the codes each; the split of least squared error.
            The release has this in a file that nothing calls; which of the two the paper means is open.
        bits: 2 to 8.
        steps: Of "log", codes an octave: 1 is base two, 4 the fourth root of two.
    """

    kind: Kind
    bits: int
    steps: int = 1

    def __post_init__(self):
        if self.kind not in get_args(Kind):
            raise ValueError(f"unknown kind of feature grid {self.kind!r}: use one of {', '.join(get_args(Kind))}")
        if self.bits not in BITS:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.kind == "mixed" and self.bits < 3:
            raise ValueError("a mixed grid needs 3 bits: two have no code left for either half")
        if self.steps < 1 or (self.steps != 1 and self.kind != "log"):
            raise ValueError(f"{self.steps} codes an octave: at least 1, and more than 1 of 'log' alone")

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes."""
        return self.bits + (self.kind == "log2")

    @property
    def count(self) -> int:
        """Number of levels."""
        return {"log2": 2 ** (self.bits + 1) + 1, "log": 2**self.bits - 1, "mixed": 2**self.bits - 1}.get(
            self.kind, 2**self.bits
        )

    def fit(self, features: jax.Array) -> tuple[jax.Array, jax.Array]:
        """features [...] -> levels [count] ascending and edges [count - 1], at least float32.

        Edges lie half-way between levels, as the release rounds too: in the linear, not in the logarithmic domain.
        """
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        levels = self._levels(features)
        return levels, _edges(levels)

    def _levels(self, features: jax.Array) -> jax.Array:
        if self.kind in ("symmetric", "asymmetric"):
            grid = Grid(self.bits, self.kind == "symmetric")
            scale, zero_point = grid.from_range(features.min(), features.max())
            return grid.decode(jnp.arange(grid.low, grid.high + 1), scale, zero_point)
        if self.kind == "mixed":
            return self._mixed(features)
        exponents = 2**self.bits if self.kind == "log2" else 2 ** (self.bits - 1) - 1
        return _powers(jnp.abs(features).max(), exponents, self.steps)

    def _mixed(self, features: jax.Array) -> jax.Array:
        highest = features.max()

        def levels(split):
            small = jnp.where(features <= split, jnp.abs(features), 0).max()
            powers = _powers(small, 2 ** (self.bits - 2) - 1, 1)
            # The lowest uniform level is one step above the split, which the logarithmic part may already have.
            uniform = split + (highest - split) * jnp.arange(1, 2 ** (self.bits - 1) + 1) / 2 ** (self.bits - 1)
            return jnp.sort(jnp.concatenate([powers, uniform.astype(powers.dtype)]))

        def error(split):
            candidate = levels(split)
            return jnp.square(to_levels(features, candidate, _edges(candidate)) - features).mean()

        splits = jnp.linspace(_LEAST_SPLIT, 1, _SPLITS, dtype=features.dtype) * highest
        return levels(splits[jax.lax.map(error, splits).argmin()])


def _edges(levels: jax.Array) -> jax.Array:
    """Half-way between neighbours: [count] -> [count - 1]."""
    return (levels[1:] + levels[:-1]) / 2


def _powers(largest: jax.Array, count: int, steps: int) -> jax.Array:
    """0 and both signs of `count` powers of 2**(-1 / steps) times the largest: [2 count + 1], ascending."""
    magnitudes = largest * 2.0 ** (-jnp.arange(count, dtype=largest.dtype) / steps)  # descending
    return jnp.concatenate([-magnitudes, jnp.zeros((1,), largest.dtype), magnitudes[::-1]])


def to_levels(x: jax.Array, levels: jax.Array, edges: jax.Array) -> jax.Array:
    """The nearest level of every number: x [...] -> [...] in the type of the levels."""
    return levels[jnp.searchsorted(edges, x.astype(edges.dtype))]
