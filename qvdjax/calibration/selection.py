"""Which of a calibration set's inputs are worth optimising on: salient data selection of S2Q-VDiT and alternatives."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.dataset import CalibrationSet
from qvdjax.errors import UserError

By = Literal["product", "difference", "quantization", "random", "prompts", "diverse"]
Norm = Literal["frobenius", "spectral"]
_POWER_ITERATIONS = 30


@dataclasses.dataclass(frozen=True)
class Selection:
    """How inputs are chosen (arXiv 2508.04016, section 3.2).

    A candidate is one step of one prompt, with both guidance branches. With x the latents that the model is given at a
    step, X [tokens, channels] the same, and x' those of the next step visited:

        C_diff = ||x - x'||^2 / ||x||^2 (equation 3)        C_quant = ||X^T X|| (equation 6)

    each brought to 0..1 by the least and the largest of the pool, and multiplied (equations 7, 8).

    Left open by the source, and chosen here: the last step has no neighbour and is no candidate; tokens are single
    places of the latents (a model's patches hold the same numbers); the largest products are taken, however many come
    from one prompt.

    Attributes:
        count: Candidates that are chosen.
        by: "product" as published; "difference" or "quantization", one factor alone; "random"; "prompts", all steps of
            as few prompts as it takes; "diverse", products with at most ceil(count / prompts) from one prompt and no
            neighbours of a chosen step while others are left.
        norm: Of X^T X: "frobenius", which the cost in the paper speaks for, or "spectral" by power iteration.
        seed: Of "random" and "prompts".
    """

    count: int = 40
    by: By = "product"
    norm: Norm = "frobenius"
    seed: int = 0

    def __post_init__(self):
        for name, kind in (("by", By), ("norm", Norm)):
            if getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} is one of {', '.join(get_args(kind))}, not {getattr(self, name)!r}")
        if self.count < 1:
            raise ValueError(f"at least one sample has to be selected, not {self.count}")


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One step of one prompt.

    Attributes:
        sample: Number in the calibration set. step: Number of the step.
        difference, quantization, score: C_diff, C_quant, and what it is chosen by.
    """

    sample: int
    step: int
    difference: float
    quantization: float
    score: float = 0.0


def candidates(calibration: CalibrationSet, norm: Norm = "frobenius") -> list[Candidate]:
    """Both scores of every step that has a next one, sample by sample."""
    found = []
    for number in range(len(calibration)):
        sample = calibration.trajectory(number)
        latents = sample.latents
        if len(latents) < 2:
            continue
        difference = jax.device_get(_differences(latents))
        quantization = jax.device_get(_quantization(latents[:-1], norm=norm))
        pairs = zip(difference.tolist(), quantization.tolist(), strict=True)
        found += [Candidate(number, step, *pair) for step, pair in enumerate(pairs)]
    return found


@jax.jit
def _differences(latents: jax.Array) -> jax.Array:
    """(steps, ...) -> (steps - 1,)."""
    square = lambda a: jnp.square(a).sum(axis=tuple(range(1, a.ndim)))  # noqa: E731
    return square(latents[:-1] - latents[1:]) / square(latents[:-1])


@jax.jit(static_argnames="norm")
def _quantization(latents: jax.Array, norm: Norm) -> jax.Array:
    """(steps, frames, height, width, channels) -> (steps,)."""
    tokens = latents.reshape(len(latents), -1, latents.shape[-1])  # s f h w c -> s (f h w) c
    hessian = jnp.einsum("stc,std->scd", tokens, tokens, precision=jax.lax.Precision.HIGHEST)
    if norm == "frobenius":
        return jnp.linalg.norm(hessian, axis=(1, 2))
    # The matrix is symmetric and not negative: power iteration finds its largest eigenvalue, the spectral norm.
    vector = jnp.ones((len(hessian), hessian.shape[-1], 1), hessian.dtype)
    normed = lambda v: v / jnp.linalg.norm(v, axis=1, keepdims=True)  # noqa: E731
    vector = jax.lax.fori_loop(0, _POWER_ITERATIONS, lambda _, v: normed(hessian @ v), normed(vector))
    return jnp.linalg.norm(hessian @ vector, axis=(1, 2))


def scored(pool: list[Candidate], by: By) -> list[Candidate]:
    """The candidates with the score that they are chosen by; the product for choices that look at no score."""
    difference, quantization = (
        _unit(np.array([getattr(one, name) for one in pool])) for name in ("difference", "quantization")
    )
    scores = {"difference": difference, "quantization": quantization}.get(by, difference * quantization)
    return [dataclasses.replace(one, score=float(score)) for one, score in zip(pool, scores, strict=True)]


def _unit(values: np.ndarray) -> np.ndarray:
    """Brought to 0..1; zeros where all are equal."""
    spread = values.max() - values.min()
    return (values - values.min()) / spread if spread > 0 else np.zeros_like(values)


def select(calibration: CalibrationSet, selection: Selection) -> "SelectedInputs":
    """The inputs that a selection takes from a calibration set.

    Raises:
        UserError: The set holds fewer candidates than are asked for.
    """
    pool = candidates(calibration, selection.norm)
    if selection.count > len(pool):
        raise UserError(
            f"{selection.count} samples are to be selected from {len(pool)} candidates",
            remedy="select fewer, or calibrate with more prompts or steps",
        )
    pool = scored(pool, selection.by)
    chosen = _choose(pool, selection)
    return SelectedInputs(calibration, tuple(pool), tuple(sorted(chosen, key=lambda one: (one.sample, one.step))))


def _choose(pool: list[Candidate], selection: Selection) -> list[Candidate]:
    random = np.random.default_rng(selection.seed)
    if selection.by == "random":
        return [pool[i] for i in random.choice(len(pool), selection.count, replace=False)]
    if selection.by == "prompts":
        order = {number: i for i, number in enumerate(random.permutation(max(one.sample for one in pool) + 1))}
        return sorted(pool, key=lambda one: order[one.sample])[: selection.count]
    best = sorted(pool, key=lambda one: -one.score)
    return _diverse(best, selection.count) if selection.by == "diverse" else best[: selection.count]


def _diverse(best: list[Candidate], count: int) -> list[Candidate]:
    """The best that are no neighbours and share prompts evenly; then, where these do not suffice, the best others."""
    share = -(-count // len({one.sample for one in best}))
    chosen: list[Candidate] = []
    for one in best:
        own = [other.step for other in chosen if other.sample == one.sample]
        if len(chosen) < count and len(own) < share and all(abs(step - one.step) > 1 for step in own):
            chosen.append(one)
    others = [one for one in best if one not in chosen]
    return chosen + others[: count - len(chosen)]


@dataclasses.dataclass(frozen=True)
class SelectedInputs:
    """Batches of one model input each: every chosen step with its prompt, and with its negative prompt.

    Attributes:
        calibration: Where they are read from, anew each time.
        pool: All candidates with their scores.
        chosen: Those selected, in the order of samples and steps.
    """

    calibration: CalibrationSet
    pool: tuple[Candidate, ...]
    chosen: tuple[Candidate, ...]

    def table(self) -> list[dict[str, Any]]:
        """One row a candidate: its fields, and whether it was `chosen`."""
        chosen = {(one.sample, one.step) for one in self.chosen}
        return [{**dataclasses.asdict(one), "chosen": (one.sample, one.step) in chosen} for one in self.pool]

    def __len__(self) -> int:
        return 2 * len(self.chosen)

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        steps: dict[int, list[int]] = {}
        for one in self.chosen:
            steps.setdefault(one.sample, []).append(one.step)
        for sample, numbers in steps.items():
            yield from self.calibration.trajectory(sample).inputs(numbers)
