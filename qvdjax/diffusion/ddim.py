"""DDIM: the deterministic step between two noise levels of a variance-preserving model."""

import dataclasses

import jax
import numpy as np

from qvdjax.diffusion.alphas import VariancePreserving
from qvdjax.diffusion.schedule import LatentsState, Schedule, weighted_sum


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DDIMSchedule(Schedule):
    """A schedule with the weights of DDIM's two sums.

    Attributes:
        clean: Weights of (latents, prediction) in the clean latents, shape (steps, 2).
        update: Weights of (latents, clean latents) in the next latents, shape (steps, 2).
    """

    clean: np.ndarray
    update: np.ndarray


@dataclasses.dataclass(frozen=True)
class DDIM(VariancePreserving):
    """Song et al. 2021 (arXiv 2010.02502), equation 12 without noise; CogVideoX's and AnimateDiff's sampler.

    With a the share of signal before the step and a' after it,
    x' = A * x + (sqrt(a') - sqrt(a) * A) * clean, A = sqrt((1 - a') / (1 - a)). This form, of
    diffusers' `CogVideoXDDIMScheduler`, also holds where a is 0. Clean latents are never clipped.
    """

    def schedule(self, steps: int) -> DDIMSchedule:
        """The run's timesteps and weights. Raises `UserError`, see `VariancePreserving.levels`."""
        levels = self.levels(steps)
        before, after = levels.before, levels.after
        kept = np.sqrt((1 - after) / (1 - before))
        update = np.stack([kept, np.sqrt(after) - np.sqrt(before) * kept], axis=1)  # (steps,) twice -> (steps, 2)
        return DDIMSchedule(levels.timesteps.astype(np.float64), self.clean_weights(before), update)

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> LatentsState:
        """The state before the first step; `noise` (batch, frames, height, width, channels)."""
        return LatentsState(noise)

    def step(self, row: DDIMSchedule, state: LatentsState, prediction: jax.Array) -> LatentsState:
        """One step; `prediction` is the model's at `state.latents`. The result has the latents' dtype."""
        clean = self.clean(row, state.latents, prediction)
        return LatentsState(weighted_sum(row.update, (state.latents, clean)))
