"""Euler's method for flow matching."""

import dataclasses
from typing import ClassVar

import jax
import numpy as np

from qvdjax.diffusion.examples import Example, flow_example
from qvdjax.diffusion.schedule import (
    TRAIN_TIMESTEPS,
    FlowSchedule,
    LatentsState,
    check_shift,
    check_steps,
    end_of_flow,
    shifted,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class FlowMatchEuler:
    """latents += (next_sigma - sigma) * velocity, on an even grid of noise levels that is then shifted.

    The grid is `linspace(1, 0, steps + 1)`, as HunyuanVideo and diffusers' pipelines for it give it to
    `FlowMatchEulerDiscreteScheduler.set_timesteps(sigmas=...)`; timesteps are 1000 * sigma, not rounded.

    Attributes:
        shift: 1 for none; HunyuanVideo uses 7.
    """

    shift: float = 1.0

    diffusion: ClassVar = "flow"

    def __post_init__(self):
        check_shift(self.shift)

    def schedule(self, steps: int) -> FlowSchedule:
        """The run's noise levels. Raises `UserError` for fewer than one step."""
        check_steps(steps)
        sigmas = shifted(np.linspace(1.0, 0.0, steps + 1), self.shift)
        return FlowSchedule(TRAIN_TIMESTEPS * sigmas[:-1], sigmas[:-1], sigmas[1:])

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> LatentsState:
        """The state before the first step; `noise` (batch, frames, height, width, channels)."""
        return LatentsState(noise)

    def clean(self, row: FlowSchedule, latents: jax.Array, velocity: jax.Array) -> jax.Array:
        """See `Solver.clean`."""
        return end_of_flow(row.sigmas, latents, velocity)

    def step(self, row: FlowSchedule, state: LatentsState, velocity: jax.Array) -> LatentsState:
        """One step along `velocity`, the model's prediction at `state.latents`, in the latents' dtype."""
        step_size = (row.next_sigmas - row.sigmas).astype(state.latents.dtype)
        return LatentsState(state.latents + step_size * velocity.astype(state.latents.dtype))

    def example(self, clean: jax.Array, noise: jax.Array, uniform: jax.Array) -> Example:
        """What its models are trained on, see `flow_example`."""
        return flow_example(clean, noise, uniform, self.shift)
