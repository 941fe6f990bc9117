"""What a solver needs to know of every step, laid out before the first one.

A schedule is computed once in NumPy float64 and then carried as arrays with a leading step axis, so the
sampler can walk along it inside `jax.lax.scan`: no logarithm of a noise level is ever taken in float32.
"""

import dataclasses
import math
from typing import Self

import jax
import numpy as np

from qvdjax.errors import UserError

TRAIN_TIMESTEPS = 1000
"""Timesteps run from 0 (clean) to 1000 (noise): continuous for flow matching, else the whole numbers below."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Schedule:
    """The steps of one sampling run; a pytree whose leaves all have the leading axis `steps`.

    Every solver adds what its own steps need.

    Attributes:
        timesteps: What the model is told, shape (steps,): in 0..1000, or as the solver says.
    """

    timesteps: np.ndarray

    @property
    def steps(self) -> int:
        """Number of steps, so of model evaluations per guidance branch."""
        return self.timesteps.shape[0]

    def row(self, step: int) -> Self:
        """The values of one step, as `jax.lax.scan` hands them to `Solver.step`."""
        return jax.tree.map(lambda values: values[step], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FlowSchedule(Schedule):
    """The steps along a straight flow, latents = (1 - sigma) * video + sigma * noise.

    Attributes:
        sigmas: Share of noise in the latents that enter the step, in 0..1, shape (steps,).
        next_sigmas: The same for the latents that leave it; the last is 0, shape (steps,).
    """

    sigmas: np.ndarray
    next_sigmas: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentsState:
    """What a solver without memory carries between steps: nothing but the latents."""

    latents: jax.Array


def weighted_sum(weights: jax.Array, arrays: tuple[jax.Array, ...]) -> jax.Array:
    """sum_i weights[i] * arrays[i] in the arrays' dtype."""
    return sum(weights[i].astype(array.dtype) * array for i, array in enumerate(arrays))


def end_of_flow(sigmas: jax.Array, latents: jax.Array, velocity: jax.Array) -> jax.Array:
    """Where a straight flow leads from latents with a share `sigmas` of noise, in the latents' dtype."""
    return latents - sigmas.astype(latents.dtype) * velocity.astype(latents.dtype)


def clean_of_weights(weights: jax.Array, latents: jax.Array, prediction: jax.Array) -> jax.Array:
    """The clean latents as a sum of the latents and the prediction, weights (2,), in the latents' dtype."""
    return weighted_sum(weights, (latents, prediction.astype(latents.dtype)))


def shifted(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move noise levels towards 1, as flow-matching models of high resolution need: s*x / (1 + (s-1)*x).

    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def check_steps(steps: int) -> None:
    """Raise `UserError` unless `steps` is a number of steps one can take."""
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer) or steps < 1:
        raise UserError(f"steps is {steps!r}", remedy="give a whole number of at least 1")


def check_shift(shift: float) -> None:
    """Raise `UserError` unless `shift` is positive and finite."""
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(
            f"the solver's shift is {shift!r}",
            remedy="give a positive number (1 means none, video models use 3 to 12)",
        )
