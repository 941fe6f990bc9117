"""Variance-preserving diffusion: how much signal is left at each of the 1000 timesteps a model was trained on.

x_t = sqrt(a_t) * clean + sqrt(1 - a_t) * noise, with a_t the cumulative product of 1 - beta. What is here is
shared by the solvers for such models; it follows diffusers 0.42 (`scheduling_ddim_cogvideox.py`,
`scheduling_ddim.py`) and is computed in NumPy float64.
"""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args

import jax
import numpy as np

from qvdjax.diffusion.examples import Example, variance_preserving_example
from qvdjax.diffusion.schedule import TRAIN_TIMESTEPS, check_steps, clean_of_weights
from qvdjax.errors import UserError

BetaSchedule = Literal["scaled_linear", "linear"]
TimestepSpacing = Literal["trailing", "leading", "linspace"]
PredictionType = Literal["v_prediction", "epsilon", "sample"]


@dataclasses.dataclass(frozen=True)
class Levels:
    """The steps of one run; all arrays (steps,).

    Attributes:
        timesteps: What the model is told, whole numbers.
        before, after: a before and after each step, float64.
        ends: Whether a step leads to the end, beyond timestep 0.
    """

    timesteps: np.ndarray
    before: np.ndarray
    after: np.ndarray
    ends: np.ndarray


@dataclasses.dataclass(frozen=True)
class VariancePreserving:
    """What a solver must know of a variance-preserving model. The defaults are CogVideoX-2B's.

    Attributes:
        beta_start, beta_end: Variance added by the first and the last training timestep.
        beta_schedule: "scaled_linear": the betas' square roots are evenly spaced; "linear": the betas are.
        snr_shift_scale: The signal-to-noise ratio a / (1 - a) is divided by it; 1 for none. CogVideoX-2B has 3,
            CogVideoX-5B and 1.5 have 1.
        rescale_betas_zero_snr: Move and stretch sqrt(a_t) so that nothing of the signal is left at the last
            timestep (Lin et al. 2023, arXiv 2305.08891, algorithm 1). After the shift, as in CogVideoX.
        set_alpha_to_one: The last step leads to clean latents; otherwise to the noise of timestep 0.
        timestep_spacing: Which of the timesteps are visited (Lin et al. 2023, table 2): "trailing" starts at the
            last and "leading" ends at the first, "linspace" does both.
        steps_offset: Added to the timesteps of "leading".
        prediction_type: What the model predicts: "v_prediction", sqrt(a) * noise - sqrt(1 - a) * clean (Salimans
            and Ho 2022); "epsilon", the noise; "sample", the clean latents.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: BetaSchedule = "scaled_linear"
    snr_shift_scale: float = 3.0
    rescale_betas_zero_snr: bool = True
    set_alpha_to_one: bool = True
    timestep_spacing: TimestepSpacing = "trailing"
    steps_offset: int = 0
    prediction_type: PredictionType = "v_prediction"

    diffusion: ClassVar = "variance-preserving"

    def __post_init__(self):
        for name, known in (
            ("beta_schedule", get_args(BetaSchedule)),
            ("timestep_spacing", get_args(TimestepSpacing)),
            ("prediction_type", get_args(PredictionType)),
            ("rescale_betas_zero_snr", (True, False)),
            ("set_alpha_to_one", (True, False)),
        ):
            value = getattr(self, name)
            if not any(value is one or (isinstance(value, str) and value == one) for one in known):  # 1 is not True
                raise UserError(
                    f"the solver's {name} is {value!r}", remedy=f"choose one of {', '.join(map(str, known))}"
                )
        if not all(_is_number(beta) for beta in (self.beta_start, self.beta_end)) or not (
            0 < self.beta_start <= self.beta_end < 1
        ):
            raise UserError(
                f"the solver's betas run from {self.beta_start!r} to {self.beta_end!r}",
                remedy="give numbers between 0 and 1, the smaller one first",
            )
        if not (_is_number(self.snr_shift_scale) and self.snr_shift_scale > 0):
            raise UserError(
                f"the solver's snr_shift_scale is {self.snr_shift_scale!r}",
                remedy="give a positive number (1 means none)",
            )
        if isinstance(self.steps_offset, bool) or not isinstance(self.steps_offset, int) or self.steps_offset < 0:
            raise UserError(f"the solver's steps_offset is {self.steps_offset!r}", remedy="give 0, 1, 2, ...")

    def clean(self, row: Any, latents: jax.Array, prediction: jax.Array) -> jax.Array:
        """See `Solver.clean`; `row.clean` are the weights of the two."""
        return clean_of_weights(row.clean, latents, prediction)

    def alphas_cumprod(self) -> np.ndarray:
        """a_t for every training timestep, float64 (1000,), falling."""
        if self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, TRAIN_TIMESTEPS) ** 2
        else:
            betas = np.linspace(self.beta_start, self.beta_end, TRAIN_TIMESTEPS)
        alphas = np.cumprod(1 - betas)
        alphas = alphas / (self.snr_shift_scale + (1 - self.snr_shift_scale) * alphas)
        if self.rescale_betas_zero_snr:
            first, last = np.sqrt(alphas[[0, -1]])
            alphas = ((np.sqrt(alphas) - last) * (first / (first - last))) ** 2
        return alphas

    def timesteps(self, steps: int) -> np.ndarray:
        """The timesteps that are visited, whole numbers in falling order, (steps,).

        Raises `UserError` for a number of steps outside 1..1000 and for an offset that leaves the timesteps.
        """
        check_steps(steps)
        if steps > TRAIN_TIMESTEPS:
            raise UserError(f"steps is {steps}", remedy=f"this solver takes at most {TRAIN_TIMESTEPS}")
        if self.timestep_spacing == "trailing":
            # For 62 of the thousand numbers of steps (61, 103, ...) arange makes one element too many, and
            # diffusers a last step at timestep -1; that one is left out here.
            timesteps = np.round(np.arange(TRAIN_TIMESTEPS, 0, -TRAIN_TIMESTEPS / steps))[:steps] - 1
        elif self.timestep_spacing == "leading":
            timesteps = np.arange(steps)[::-1] * (TRAIN_TIMESTEPS // steps) + self.steps_offset
        else:
            timesteps = np.linspace(0, TRAIN_TIMESTEPS - 1, steps).round()[::-1]
        if timesteps[0] >= TRAIN_TIMESTEPS:
            raise UserError(
                f"the first timestep of {steps} steps is {timesteps[0]:g}, beyond {TRAIN_TIMESTEPS - 1}",
                remedy="choose a smaller steps_offset",
            )
        return timesteps.astype(np.int64)

    def levels(self, steps: int) -> "Levels":
        """Every step's timestep and shares of signal.

        As diffusers has it, a step leads 1000 // steps timesteps down, whatever the next timestep is. With
        "trailing" and "leading" the two are at most one apart; with "linspace" and few steps the model is told
        less noise than there is. What lies below timestep 0 is the end, see `set_alpha_to_one`.

        Raises `UserError` as `timesteps` does, and where `epsilon` is to be divided by a signal of zero.
        """
        timesteps, alphas = self.timesteps(steps), self.alphas_cumprod()
        targets = timesteps - TRAIN_TIMESTEPS // steps
        end = 1.0 if self.set_alpha_to_one else alphas[0]
        before, after = alphas[timesteps], np.where(targets >= 0, alphas[targets], end)
        if self.prediction_type == "epsilon" and (before == 0).any():
            raise UserError(
                "a predicted noise says nothing about the video where there is no signal, at timestep 999",
                remedy="set rescale_betas_zero_snr to False, or timestep_spacing to leading",
            )
        return Levels(timesteps, before, after, targets < 0)

    def example(self, clean: jax.Array, noise: jax.Array, uniform: jax.Array) -> Example:
        """What its models are trained on, see `variance_preserving_example`."""
        return variance_preserving_example(clean, noise, uniform, self.alphas_cumprod(), self.prediction_type)

    def clean_weights(self, alphas: np.ndarray) -> np.ndarray:
        """Weights of (latents, prediction) whose sum is the predicted clean latents: (steps,) -> (steps, 2)."""
        signal, noise = np.sqrt(alphas), np.sqrt(1 - alphas)
        if self.prediction_type == "v_prediction":
            weights = [signal, -noise]
        elif self.prediction_type == "epsilon":
            weights = [1 / signal, -noise / signal]
        else:
            weights = [np.zeros_like(signal), np.ones_like(signal)]
        return np.stack(weights, axis=1)


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
