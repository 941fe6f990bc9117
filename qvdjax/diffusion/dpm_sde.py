"""DPM-Solver++(2M) for the stochastic equation: two-step memory, fresh noise at every step."""

import dataclasses

import jax
import numpy as np

from qvdjax.diffusion.alphas import Levels, VariancePreserving
from qvdjax.diffusion.noise import step_keys, step_noise
from qvdjax.diffusion.schedule import Schedule, weighted_sum
from qvdjax.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPMSchedule(Schedule):
    """A schedule with the weights of the two sums.

    Attributes:
        clean: Weights of (latents, prediction) in the clean latents, shape (steps, 2).
        update: Weights of (latents, clean latents, previous clean latents, fresh noise) in the next latents,
            shape (steps, 4).
        index: 0, 1, ...: which noise is drawn, shape (steps,).
    """

    clean: np.ndarray
    update: np.ndarray
    index: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DPMState:
    """What is remembered between steps.

    Attributes:
        latents: What the model sees next.
        clean: The previous prediction of the clean latents, shaped as the latents.
        keys: One random key a video, (batch,); the noise of a step follows from it and the step alone.
    """

    latents: jax.Array
    clean: jax.Array
    keys: jax.Array


@dataclasses.dataclass(frozen=True)
class DPMSolverSDE(VariancePreserving):
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, appendix), as CogVideoX samples.

    It follows diffusers' `CogVideoXDPMScheduler` and the original `VPSDEDPMPP2MSampler`
    (zai-org/CogVideo: sat/sgm/modules/diffusionmodules/sampling.py). With lambda = log(a / (1 - a)) / 2,
    h = lambda' - lambda and r = (lambda - lambda_previous) / h,
    x' = sqrt((1 - a') / (1 - a)) e^-h x - (e^-2h - 1) sqrt(a') D + sqrt((1 - a') (1 - e^-2h)) noise,
    where D = (1 + 1/2r) clean - (1/2r) previous clean; D = clean at the first step and at one that ends the run.

    diffusers draws twice in a step with two predictions and uses the second draw; here one is drawn, which
    has the same distribution. The draw is standard normal float32 of the video's seed and the number of
    the step, see `qvdjax.diffusion.noise.step_noise`.
    """

    def schedule(self, steps: int) -> DPMSchedule:
        """The run's timesteps and weights. Raises `UserError`, see `VariancePreserving.levels`."""
        levels = self.levels(steps)
        return DPMSchedule(
            timesteps=levels.timesteps.astype(np.float64),
            clean=self.clean_weights(levels.before),
            update=np.stack([_update_weights(levels, step) for step in range(steps)]),
            index=np.arange(steps, dtype=np.int32),
        )

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> DPMState:
        """The state before the first step.

        Args:
            noise: (batch, frames, height, width, channels).
            seeds: Of each video, as for `initial_noise`, (batch,) unsigned.

        Raises `UserError` without seeds: noise that only depended on the place in the batch would make another
        video of the same seed.
        """
        if seeds is None:
            raise UserError(
                "this solver draws noise at every step and was given no seeds",
                remedy="pass the videos' seeds, those of their initial noise, to `sample`",
            )
        # A finite stand-in for a past that does not exist: its weight is zero.
        return DPMState(noise, noise, step_keys(seeds))

    def step(self, row: DPMSchedule, state: DPMState, prediction: jax.Array) -> DPMState:
        """One step; `prediction` is the model's at `state.latents`. The result has the latents' dtype."""
        latents = state.latents
        clean = self.clean(row, latents, prediction)
        noise = step_noise(state.keys, row.index, latents.shape[1:], latents.dtype)
        return DPMState(weighted_sum(row.update, (latents, clean, state.clean, noise)), clean, state.keys)


def _update_weights(levels: Levels, step: int) -> np.ndarray:
    """The weights (4,) that lead from `step` to the next; see `DPMSchedule.update`."""
    before, after = levels.before[step], levels.after[step]
    # Without signal lambda is -inf, without noise it is inf, and both are meant: h is inf, e^-h is 0.
    with np.errstate(divide="ignore"):
        h = _log_snr(after) - _log_snr(before)
        latents = np.sqrt((1 - after) / (1 - before)) * np.exp(-h)
        clean = -np.expm1(-2 * h) * np.sqrt(after)
        noise = np.sqrt((1 - after) * -np.expm1(-2 * h))
        if step == 0 or levels.ends[step]:
            return np.array([latents, clean, 0.0, noise])
        extrapolation = h / (2 * (_log_snr(before) - _log_snr(levels.before[step - 1])))  # 1 / 2r
    return np.array([latents, clean * (1 + extrapolation), -clean * extrapolation, noise])


def _log_snr(alpha: np.float64) -> np.float64:
    """lambda = log(a / (1 - a)) / 2."""
    return (np.log(alpha) - np.log1p(-alpha)) / 2
