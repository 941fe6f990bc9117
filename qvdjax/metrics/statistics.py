"""Means over few prompts, and how far to trust them."""

import dataclasses

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, all in the unit of the values."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def bootstrap_interval(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap interval of the mean (Efron 1979): resample with replacement, take the
    percentiles.

    The values are exchangeable units, here one a prompt. With few of them the interval is too narrow: with
    8 normal values a nominal 95 % interval covers the true mean in about 90 % of cases. A single value has
    no spread to resample, its interval is the value itself.

    Args:
        values: (prompts,), finite.
        confidence: nominal coverage, between 0 and 1.
        resamples: how many bootstrap means the percentiles are read from.
        seed: of the resampling; equal values and seed give an equal interval.

    Raises:
        ValueError: no values, more than one axis, or values that are not finite.
    """
    values = _prompts(values)
    means = values[_picks(len(values), resamples, seed)].mean(axis=1)  # (resamples, prompts) -> (resamples,)
    return _interval(float(values.mean()), means, confidence)


def _prompts(values: ArrayLike) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"values must be one axis with at least one entry, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError("values must be finite")
    return values


def _pairs(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape:
        raise ValueError(f"pairs need equal shapes, got {first.shape} and {second.shape}")
    return first, second


def _picks(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _interval(found: float, resampled: np.ndarray, confidence: float) -> Interval:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    # Equal values can differ from their own mean in the last bit; the interval must hold what was found.
    return Interval(found, min(float(low), found), max(float(high), found))


def paired_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of the mean of first - second, prompt by prompt.

    Two candidates measured on the same prompts and seeds share most of their variation; their difference
    does not, so its interval tells candidates apart where their own intervals overlap.

    Args:
        first, second: (prompts,), the same prompts in the same order.

    Raises:
        ValueError: the shapes differ, or as `bootstrap_interval`.
    """
    first, second = _pairs(first, second)
    return bootstrap_interval(first - second, confidence=confidence, resamples=resamples, seed=seed)


def relative_difference(
    first: ArrayLike,
    second: ArrayLike,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of mean(first) / mean(second) - 1, the same prompts drawn for both: of values that are not negative, at
    least -1.

    Args:
        first, second: (prompts,), the same prompts in the same order; the second above zero.

    Raises:
        ValueError: the shapes differ, values of the second that are not above zero, or as `bootstrap_interval`.
    """
    first, second = (_prompts(side) for side in _pairs(first, second))
    if (second <= 0).any():
        raise ValueError("what is compared with must be above zero")
    picks = _picks(len(first), resamples, seed)
    ratios = first[picks].mean(axis=1) / second[picks].mean(axis=1)  # (resamples, prompts) -> (resamples,)
    return _interval(float(first.mean() / second.mean()) - 1, ratios - 1, confidence)
