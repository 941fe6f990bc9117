"""Euler's method for models with the preconditioning of EDM (Karras et al. 2022, arXiv 2206.00364).

Noise levels s are standard deviations beside clean latents of variance 1: x = clean + s * noise. The model sees
x / sqrt(s^2 + 1) and is told log(s) / 4, and the clean latents are x / (s^2 + 1) - s / sqrt(s^2 + 1) * prediction. Read
in diffusers 0.42 `schedulers/scheduling_euler_discrete.py` with `timestep_type` "continuous", `prediction_type`
"v_prediction" and `use_karras_sigmas`, which is how Stable Video Diffusion is sampled.

What is carried from step to step here is what the model sees, x / sqrt(s^2 + 1), as with all other solvers: its
variance is 1 from the first step to the last, where s is 0 and the two are the same.
"""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qvdjax.diffusion.ddim import DDIMSchedule
from qvdjax.diffusion.examples import Example
from qvdjax.diffusion.schedule import LatentsState, check_steps, clean_of_weights, weighted_sum
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class EulerEDM:
    """x += (next_s - s) * (x - clean) / s, on the noise levels of Karras et al. (equation 5). The first latents are
    noise of variance 1, so x is sqrt(sigma_max^2 + 1) times it.

    Attributes:
        sigma_min, sigma_max: The last and the first noise level; after the last comes 0. The defaults are Stable Video
            Diffusion's.
        rho: Levels are evenly spaced in s^(1 / rho).
    """

    sigma_min: float = 0.002
    sigma_max: float = 700.0
    rho: float = 7.0

    diffusion: ClassVar = "edm"

    def __post_init__(self):
        for name in ("sigma_min", "sigma_max", "rho"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and value > 0):
                raise UserError(f"the solver's {name} is {value!r}", remedy="give a positive number")
        if self.sigma_min >= self.sigma_max:
            raise UserError(
                f"the solver's noise levels run from {self.sigma_max!r} down to {self.sigma_min!r}",
                remedy="make sigma_min the smaller one",
            )

    def schedule(self, steps: int) -> DDIMSchedule:
        """The run's timesteps and weights. Raises `UserError` for fewer than one step."""
        check_steps(steps)
        sigmas = self.sigmas(np.linspace(0.0, 1.0, steps))
        after = np.append(sigmas[1:], 0.0)
        norm, next_norm = np.sqrt(sigmas**2 + 1), np.sqrt(after**2 + 1)
        clean = np.stack([1 / norm, -sigmas / norm], axis=1)  # (steps,) twice -> (steps, 2)
        update = np.stack([after / sigmas * norm / next_norm, (1 - after / sigmas) / next_norm], axis=1)
        return DDIMSchedule(np.log(sigmas) / 4, clean, update)

    def sigmas(self, progress):
        """Noise levels at 0 (first) to 1 (last) of the way, shaped as `progress`."""
        first, last = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        return (first + progress * (last - first)) ** self.rho

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> LatentsState:
        """The state before the first step; `noise` (batch, frames, height, width, channels)."""
        return LatentsState(noise)

    def clean(self, row: DDIMSchedule, latents: jax.Array, prediction: jax.Array) -> jax.Array:
        """See `Solver.clean`."""
        return clean_of_weights(row.clean, latents, prediction)

    def step(self, row: DDIMSchedule, state: LatentsState, prediction: jax.Array) -> LatentsState:
        """One step; `prediction` is the model's at `state.latents`. The result has the latents' dtype."""
        clean = self.clean(row, state.latents, prediction)
        return LatentsState(weighted_sum(row.update, (state.latents, clean)))

    def example(self, clean: jax.Array, noise: jax.Array, uniform: jax.Array) -> Example:
        """(clean + s * noise) / sqrt(s^2 + 1) at noise levels spread as a sampler visits them, and
        (noise - s * clean) / sqrt(s^2 + 1), which the model should predict.

        From clean latents and noise (batch, frames, height, width, channels) and `uniform` (batch,) in 0..1.
        """
        sigmas = self.sigmas(1 - uniform)
        s = rearrange(sigmas, "b -> b 1 1 1 1").astype(clean.dtype)
        norm = jnp.sqrt(s**2 + 1)
        return Example((clean + s * noise) / norm, jnp.log(sigmas) / 4, (noise - s * clean) / norm)
