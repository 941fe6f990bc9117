"""UniPC for flow matching: a multistep predictor with a corrector that costs no model evaluation.

Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"
(arXiv 2302.04867), variant B2 ("bh2") on the prediction of the clean latents. It follows
`Wan-Video/Wan2.2:wan/utils/fm_solvers_unipc.py` and diffusers' `UniPCMultistepScheduler` with
`use_flow_sigmas=True`.

Both updates are linear in the latents and in the last few predictions, with weights that depend on the
noise levels alone. They are computed here once, in float64; a step is then two weighted sums.
"""

import dataclasses
from typing import ClassVar, Literal, get_args

import jax
import numpy as np

from qvdjax.diffusion.examples import Example, flow_example
from qvdjax.diffusion.schedule import (
    TRAIN_TIMESTEPS,
    FlowSchedule,
    check_shift,
    check_steps,
    end_of_flow,
    shifted,
    weighted_sum,
)
from qvdjax.errors import UserError

SigmaGrid = Literal["original", "diffusers"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPCSchedule(FlowSchedule):
    """A schedule with the weights of UniPC's two sums.

    Attributes:
        corrector: Weights of (predicted latents, previous corrected latents, this clean prediction, the last
            `order` clean predictions, newest first), shape (steps, 3 + order).
        predictor: Weights of (corrected latents, this clean prediction, the last `order - 1` clean
            predictions, newest first), shape (steps, 1 + order).
    """

    corrector: np.ndarray
    predictor: np.ndarray


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UniPCState:
    """What UniPC remembers between steps; every array has the shape of the latents.

    Attributes:
        latents: What the predictor made and the model sees next.
        corrected: What the corrector made of the latents one step earlier.
        history: The last `order` predictions of the clean latents, newest first.
    """

    latents: jax.Array
    corrected: jax.Array
    history: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class UniPCFlow:
    """UniPC (B2, predicts the clean latents, lower order at the end) on a shifted flow-matching grid.

    Attributes:
        shift: 1 for none. Wan: 5 (generate.py), 3 for image-to-video at 480p, 8 to 12 advised for the 1.3B.
        order: 1 to 3; Wan uses 2.
        sigma_grid: "original", linspace(0.999, 0), is what Wan's own code samples with and what the
            checkpoints were evaluated on. "diffusers", linspace(1, 0.001) with the first level lowered by
            1e-6 so that its logarithm exists, is what diffusers does (0.42). In both the last step leads to
            0, the levels are kept in float32 and timesteps are cut to whole numbers, and so it is here.
    """

    shift: float = 5.0
    order: int = 2
    sigma_grid: SigmaGrid = "original"

    diffusion: ClassVar = "flow"

    def __post_init__(self):
        check_shift(self.shift)
        if type(self.order) is not int or self.order not in (1, 2, 3):
            raise UserError(f"UniPC's order is {self.order!r}", remedy="choose 1, 2 or 3")
        if self.sigma_grid not in get_args(SigmaGrid):
            raise UserError(
                f"UniPC's sigma grid is {self.sigma_grid!r}",
                remedy=f"choose one of {', '.join(get_args(SigmaGrid))}",
            )

    def schedule(self, steps: int) -> UniPCSchedule:
        """The run's noise levels and weights. Raises `UserError` for fewer than one step."""
        check_steps(steps)
        sigmas = self._sigmas(steps)
        timesteps = np.trunc(TRAIN_TIMESTEPS * sigmas)
        # Upstream computes its weights from levels held in float32; near 1 the rounding decides 1 - sigma.
        sigmas = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
        if sigmas[0] >= 1 or not np.all(np.diff(sigmas) < 0):
            raise UserError(
                f"with shift {self.shift} and {steps} steps two noise levels are the same float32 number",
                remedy="choose a shift nearer to 1 or fewer steps",
            )
        # Warm-up: as many earlier predictions as there are; at the end one order less a step, down to 1.
        orders = [min(self.order, step + 1, steps - step) for step in range(steps)]
        return UniPCSchedule(
            timesteps=timesteps,
            sigmas=sigmas[:-1],
            next_sigmas=sigmas[1:],
            corrector=np.stack([self._corrector(sigmas, orders, step) for step in range(steps)]),
            predictor=np.stack([self._predictor(sigmas, orders, step) for step in range(steps)]),
        )

    def init(self, noise: jax.Array, seeds: jax.Array | None = None) -> UniPCState:
        """The state before the first step; `noise` (batch, frames, height, width, channels)."""
        # Finite stand-ins for a past that does not exist: their weights are zero.
        return UniPCState(noise, noise, (noise,) * self.order)

    def clean(self, row: UniPCSchedule, latents: jax.Array, velocity: jax.Array) -> jax.Array:
        """See `Solver.clean`."""
        return end_of_flow(row.sigmas, latents, velocity)

    def step(self, row: UniPCSchedule, state: UniPCState, velocity: jax.Array) -> UniPCState:
        """Correct the latents with what the model said about them, then predict the next ones.

        `velocity` is the model's prediction at `state.latents`; the result has the latents' dtype.
        """
        clean = self.clean(row, state.latents, velocity)
        corrected = weighted_sum(row.corrector, (state.latents, state.corrected, clean, *state.history))
        latents = weighted_sum(row.predictor, (corrected, clean, *state.history[:-1]))
        return UniPCState(latents, corrected, (clean, *state.history[:-1]))

    def example(self, clean: jax.Array, noise: jax.Array, uniform: jax.Array) -> Example:
        """What its models are trained on, see `flow_example`."""
        return flow_example(clean, noise, uniform, self.shift)

    def _sigmas(self, steps: int) -> np.ndarray:
        """Noise levels before each step, float64 (steps,)."""
        if self.sigma_grid == "original":
            # Wan reads the largest level back from a float32 tensor.
            return shifted(np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1], self.shift)
        sigmas = shifted(np.linspace(1.0, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], self.shift)
        sigmas[0] -= 1e-6
        return sigmas

    def _predictor(self, sigmas: np.ndarray, orders: list[int], step: int) -> np.ndarray:
        """Weights (1 + order,) that lead from `step` to the next; see `UniPCSchedule.predictor`."""
        known = sigmas[step::-1][: orders[step]]  # this level, then earlier ones
        sample, clean, earlier = _update_weights(known, sigmas[step + 1], corrects=False)
        return np.concatenate([[sample, clean], earlier, np.zeros(self.order - 1 - len(earlier))])

    def _corrector(self, sigmas: np.ndarray, orders: list[int], step: int) -> np.ndarray:
        """Weights (3 + order,) that lead to `step` again, from the one before it; see `UniPCSchedule`."""
        weights = np.zeros(3 + self.order)
        if step == 0:
            weights[0] = 1.0  # nothing to correct with: keep the noise
            return weights
        # The corrector has the order its predictor had, although one more prediction is known by now.
        known = sigmas[step - 1 :: -1][: orders[step - 1]]
        sample, newest, (*earlier, clean) = _update_weights(known, sigmas[step], corrects=True)
        weights[1 : 4 + len(earlier)] = [sample, clean, newest, *earlier]
        return weights


def _update_weights(known: np.ndarray, target: float, *, corrects: bool) -> tuple[float, float, np.ndarray]:
    """UniPC's B2 update as weights (equations 3 and 9 of the paper, data prediction).

    With lambda = log((1 - sigma) / sigma), h = lambda_target - lambda_known[0] and r_k the earlier levels'
    distances in units of h, the update is
    sigma'/sigma * x - (1 - sigma') * (e^-h - 1) * (m_0 + sum_k rho_k * (m_k - m_0) / r_k).

    Args:
        known: Levels at which predictions m_0, m_1, ... were made before, newest first, (order,).
        target: The level to reach; 0 is allowed with one known level.
        corrects: Whether the prediction at `target` is known too; it then is the last of the m_k, with r = 1.

    Returns:
        The weights of x, of m_0, and of the other m_k.
    """
    with np.errstate(divide="ignore"):  # a target of 0 has lambda = inf, and that is meant
        log_snr, target_log_snr = np.log((1 - known) / known), np.log((1 - target) / np.float64(target))
    h = target_log_snr - log_snr[0]
    distances = (log_snr[1:] - log_snr[0]) / h
    if corrects:
        distances = np.append(distances, 1.0)
    scale = (1 - target) * np.expm1(-h)
    others = -scale * _combination(distances, h) / distances
    return target / known[0], -scale - others.sum(), others


def _combination(distances: np.ndarray, h: float) -> np.ndarray:
    """Weights rho_k of the finite differences: solves sum_k rho_k * r_k^(n-1) = b_n for n = 1, 2, ..."""
    if len(distances) == 0:
        return distances
    if len(distances) == 1:
        # Upstream's simplification for a single difference; the exact solution differs in O(h).
        return np.array([0.5])
    order = len(distances)
    phi, factorial, right = np.expm1(-h) / -h - 1, 1, []
    for n in range(1, order + 1):
        right.append(phi * factorial / np.expm1(-h))
        factorial *= n + 1
        phi = phi / -h - 1 / factorial
    return np.linalg.solve(np.vander(distances, order, increasing=True).T, np.array(right))
