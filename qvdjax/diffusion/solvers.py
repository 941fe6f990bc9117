"""Solvers by name."""

import dataclasses
from typing import Any, Protocol

import jax

from qvdjax.diffusion.euler import FlowMatchEuler
from qvdjax.diffusion.schedule import Schedule
from qvdjax.diffusion.unipc import UniPCFlow
from qvdjax.errors import UserError

SOLVERS = {"euler": FlowMatchEuler, "unipc": UniPCFlow}
"""The names that `get_solver`, `pipeline.json` and `qvdjax sample --solver` understand."""


class Solver(Protocol):
    """What the sampler asks of a solver: a frozen dataclass, hashable and equal when its fields are."""

    def schedule(self, steps: int) -> Schedule:
        """Every step's numbers, computed in float64."""

    def init(self, noise: jax.Array) -> Any:
        """The state before the first step: a pytree with an attribute `latents`."""

    def step(self, row: Any, state: Any, velocity: jax.Array) -> Any:
        """The state after a step: `row` is one row of the schedule, `velocity` belongs to `state.latents`."""


def get_solver(name: str, **options) -> Solver:
    """The solver called `name` ("euler" or "unipc") with its dataclass fields as options.

    An option that is None is as good as left out. Raises `UserError` for an unknown name or option.
    """
    if name not in SOLVERS:
        raise UserError(f"there is no solver called {name!r}", remedy=f"choose one of {', '.join(SOLVERS)}")
    options = {key: value for key, value in options.items() if value is not None}
    fields = [field.name for field in dataclasses.fields(SOLVERS[name])]
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise UserError(
            f"solver {name!r} has no such option",
            remedy=f"its options are {', '.join(fields)}",
            items=unknown,
        )
    return SOLVERS[name](**options)
