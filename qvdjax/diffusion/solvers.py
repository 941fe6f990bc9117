"""Solvers by name."""

import dataclasses
from typing import Any, ClassVar, Literal, Protocol

import jax

from qvdjax.diffusion.ddim import DDIM
from qvdjax.diffusion.dpm_sde import DPMSolverSDE
from qvdjax.diffusion.edm import EulerEDM
from qvdjax.diffusion.euler import FlowMatchEuler
from qvdjax.diffusion.examples import Example
from qvdjax.diffusion.schedule import Schedule
from qvdjax.diffusion.unipc import UniPCFlow
from qvdjax.errors import UserError

SOLVERS = {
    "unipc": UniPCFlow, "euler": FlowMatchEuler, "ddim": DDIM, "dpm-sde": DPMSolverSDE, "euler-edm": EulerEDM,
}  # fmt: skip
"""The names that `get_solver`, `pipeline.json` and `qvdjax sample --solver` understand."""


class Solver(Protocol):
    """What the sampler asks of a solver: a frozen dataclass, hashable and equal when its fields are.

    Attributes:
        diffusion: What it takes a model to be trained on: "flow" is a straight flow from noise to video (the
            model predicts the velocity), "variance-preserving" is `VariancePreserving`, "edm" is what `EulerEDM`
            says.
    """

    diffusion: ClassVar[Literal["flow", "variance-preserving", "edm"]]

    def schedule(self, steps: int) -> Schedule:
        """Every step's numbers, computed in float64."""

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> Any:
        """The state before the first step: a pytree with an attribute `latents`.

        `seeds` (batch,) are the videos' own; only a solver that draws noise at its steps needs them.
        """

    def step(self, row: Any, state: Any, prediction: jax.Array) -> Any:
        """The state after a step: `row` is one row of the schedule, `prediction` belongs to `state.latents`.

        What the model predicts is the solver's to know: the velocity of a straight flow (`euler`, `unipc`), what the
        field `prediction_type` says (`ddim`, `dpm-sde`), or the v of EDM's preconditioning (`euler-edm`).
        """

    def clean(self, row: Any, latents: jax.Array, prediction: jax.Array) -> jax.Array:
        """What a prediction says the finished latents are, in the latents' dtype; arguments as those of `step`."""

    def example(self, clean: jax.Array, noise: jax.Array, uniform: jax.Array) -> Example:
        """What the models it samples are trained on.

        From clean latents and Gaussian noise, both (batch, frames, height, width, channels), and numbers `uniform`
        (batch,) spread evenly over 0..1, which decide how noisy each video is.
        """


def get_solver(name: str, **options) -> Solver:
    """The solver called `name`, a key of `SOLVERS`, with its dataclass fields as options.

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


def solver_name(solver: Solver) -> str:
    """The name in `SOLVERS`."""
    return next(name for name, kind in SOLVERS.items() if type(solver) is kind)


def related_solver(solver: Solver, name: str | None = None, **options) -> Solver:
    """A solver for the model that `solver` is for: the same with other options, or the one called `name`.

    A solver of another name takes over those fields that both have: the schedule the model was trained on.
    Raises `UserError` as `get_solver` does, and for a solver of another kind of diffusion.
    """
    name = solver_name(solver) if name is None else name
    if name in SOLVERS and SOLVERS[name].diffusion != solver.diffusion:
        alike = [key for key, kind in SOLVERS.items() if kind.diffusion == solver.diffusion]
        raise UserError(
            f"solver {name!r} is for models of {SOLVERS[name].diffusion} diffusion, and this one is not",
            remedy=f"choose one of {', '.join(alike)}",
        )
    options = {key: value for key, value in options.items() if value is not None}
    fields = {field.name for field in dataclasses.fields(SOLVERS[name])} if name in SOLVERS else set()
    kept = {key: value for key, value in dataclasses.asdict(solver).items() if key in fields}
    return get_solver(name, **{**kept, **options})
