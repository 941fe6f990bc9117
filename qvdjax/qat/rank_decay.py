"""Rank decay: the schedule by which an auxiliary module fades out of training."""

import dataclasses
import math
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.errors import UserError

Phases = Literal["paper", "code", "single", "keep"]
Shape = Literal["cosine", "linear", "quadratic", "cubic"]

SHORTEST_PHASE = 2  # a phase of one step would cut at u = 1 what it should have faded out
_ROUNDING = 1e-9  # keep = 2/3 has no exact double: 3 * keep is two directions, not one


@dataclasses.dataclass(frozen=True)
class RankDecay:
    """Gates of the directions of Phi by the training step (QVGen, arXiv 2505.11497, rank decay).

    The run is cut into phases of equal length. A phase begins with r directions ordered by strength; the first
    `keep` r of them stay at 1, the weaker rest is multiplied by u, which falls from 1 to 0, and is then cut. In the
    last phase all that is left fades. The gates have no parameters and add no loss; a gated direction's gradients
    are scaled by u as well, so it freezes before it is cut.

    What the sources leave open or say differently is an option:

    - `phases`: "paper" repeats while r lambda > 1 (lambda = 1 - keep), then fades the rest at once: ranks 32, 16, 8,
      4 and a last phase on 2. "code", the release, goes down to one direction: 32, 16, 8, 4, 2, 1. "single" fades
      everything over the whole run (lambda = 1, which the paper found clearly worse). "keep" never fades anything.
      Default "paper".
    - `shape`: the release has cosine (the default of paper and release) and linear. The paper compares five shapes
      and finds them close, cubic among them; its formula was not to be had, here the cubic is (1 - x)^3 and the
      quadratic (1 - x)^2.
    - A phase is total_steps // phases long, as in the release; the few steps left over run without Phi.

    Attributes:
        total_steps: Steps of the training run.
        rank: Directions at the start.
        keep: The part of the directions that survives a phase, in [0, 1); rounded down.
        phases, shape: See above.
        warm_up: Steps before the first phase in which all gates are 1; taken from `total_steps`.

    Raises:
        UserError: A number out of range, or steps too few for the phases.
    """

    total_steps: int
    rank: int = 32
    keep: float = 0.5
    phases: Phases = "paper"
    shape: Shape = "cosine"
    warm_up: int = 0

    def __post_init__(self):
        for name, value, known in (("phases", self.phases, Phases), ("shape", self.shape, Shape)):
            if value not in get_args(known):
                raise UserError(f"rank decay knows no {name} {value!r}", remedy=f"choose {', '.join(get_args(known))}")
        if self.rank < 1:
            raise UserError(f"rank decay over {self.rank} directions", remedy="give a rank of at least 1")
        if not 0 <= self.keep < 1:
            raise UserError(f"rank decay keeps {self.keep} of its directions", remedy="give a part from 0 to below 1")
        if self.warm_up < 0:
            raise UserError(f"rank decay warms up for {self.warm_up} steps", remedy="give 0 or more")
        if self.phases != "keep" and self.phase_length < SHORTEST_PHASE:
            raise UserError(
                f"{len(self.ranks)} phases of rank decay do not fit {self.total_steps} steps"
                + (f" after {self.warm_up} of warm-up" if self.warm_up else ""),
                remedy=f"give at least {self.warm_up + SHORTEST_PHASE * len(self.ranks)} steps, or a smaller rank",
            )

    @property
    def ranks(self) -> tuple[int, ...]:
        """Directions alive in each phase: (32, 16, 8, 4, 2) by default."""
        if self.phases in ("single", "keep"):
            return (self.rank,)
        ranks, rank = [], self.rank
        while rank >= 1:
            ranks.append(rank)
            if self.phases == "paper" and rank * (1 - self.keep) <= 1 + _ROUNDING:
                break
            rank = math.floor(rank * self.keep + _ROUNDING)
        return tuple(ranks)

    @property
    def phase_length(self) -> int:
        """Steps of one phase."""
        return (self.total_steps - self.warm_up) // len(self.ranks)

    def boundaries(self) -> tuple[int, ...]:
        """The first step of each phase, and last the first step without Phi. Empty where nothing ever fades."""
        if self.phases == "keep":
            return ()
        return tuple(self.warm_up + number * self.phase_length for number in range(len(self.ranks) + 1))

    def phase(self, step: jax.Array | int) -> jax.Array:
        """Number of the phase, int32 (): 0 in the first phase and before it, `len(ranks)` where Phi is gone."""
        if self.phases == "keep":
            return jnp.zeros((), jnp.int32)
        number = (jnp.asarray(step, jnp.int32) - self.warm_up) // self.phase_length
        return jnp.clip(number, 0, len(self.ranks)).astype(jnp.int32)

    def active_rank(self, step: jax.Array | int) -> jax.Array:
        """Directions that are alive, int32 (); 0 where Phi is gone."""
        return jnp.asarray((*self.ranks, 0), jnp.int32)[self.phase(step)]

    def starts_phase(self, step: jax.Array | int) -> jax.Array:
        """Whether, before this step, the directions are to be cut and made orthogonal again; bool ().

        True at the start of each phase but the first, and at the first step without Phi. With a warm-up also at
        the start of the first phase: a warm-up moves the factors, and the weakest directions are to fade. (The
        release does not, and runs without warm-up.)
        """
        starts = self.boundaries()[0 if self.warm_up else 1 :]
        return jnp.any(jnp.asarray(step, jnp.int32) == jnp.asarray(starts, jnp.int32))

    def gamma(self, step: jax.Array | int) -> jax.Array:
        """The gates of a step, float32 [rank]; of static shape, so that one compiled step serves the whole run."""
        if self.phases == "keep":
            return jnp.ones((self.rank,), jnp.float32)
        step, phase = jnp.asarray(step, jnp.int32), self.phase(step)
        done = (step - self.warm_up - phase * self.phase_length).astype(jnp.float32) / self.phase_length
        fading = _fall(jnp.clip(done, 0, 1), self.shape)
        # The last phase keeps nothing; after it nothing is alive.
        kept = np.array((*self.ranks[1:], 0, 0), np.int32)
        column = jnp.arange(self.rank)
        alive = jnp.where(column < self.active_rank(step), fading, 0.0)
        return jnp.where(column < jnp.asarray(kept)[phase], 1.0, alive).astype(jnp.float32)


def _fall(x: jax.Array, shape: Shape) -> jax.Array:
    """u(x): 1 at x = 0, 0 at x = 1."""
    if shape == "cosine":
        return (1 + jnp.cos(jnp.pi * x)) / 2
    return (1 - x) ** {"linear": 1, "quadratic": 2, "cubic": 3}[shape]
