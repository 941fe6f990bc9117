"""Timing functions against each other: alternating, medians and spread."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

MINIMUM_SECONDS = 0.02  # a sample repeats its function until it lasts this long, so that launching is hidden
LONG_SECONDS = 1.0  # functions that take longer are sampled in fewer rounds
LONG_ROUNDS = 3


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Time of one call in milliseconds: the median of `rounds` samples and their interquartile range."""

    median_ms: float
    spread_ms: float
    rounds: int
    calls_per_sample: int


class Timed:
    """A function compiled for its arguments, ready to be called again and again.

    Arguments are flattened once, so that a call does not walk through modules in Python.
    """

    def __init__(self, function: Callable, *arguments: Any):
        leaves, structure = jax.tree.flatten(arguments)
        begin = time.perf_counter()
        self._leaves = leaves
        self._call = jax.jit(lambda *leaves: function(*jax.tree.unflatten(structure, leaves)))
        self.output = jax.block_until_ready(self._call(*leaves))
        self.compile_seconds = time.perf_counter() - begin

    def sample(self, calls: int) -> float:
        """Seconds a call, over `calls` calls queued one after the other and waited for together."""
        begin = time.perf_counter()
        for _ in range(calls):
            output = self._call(*self._leaves)
        jax.block_until_ready(output)
        return (time.perf_counter() - begin) / calls


def measure(functions: Sequence[Timed], rounds: int) -> list[Measurement]:
    """Time functions against each other.

    After one warm sample each, every round samples each function once, starting with another one each time:
    what drifts (clocks, heat, other work on the machine) then meets all of them alike. A sample repeats its
    function until it lasts `MINIMUM_SECONDS`.
    """
    calls = []
    for function in functions:
        once = function.sample(1)
        warm = function.sample(max(1, min(100, round(MINIMUM_SECONDS / max(once, 1e-6)))))
        calls.append(max(1, min(1000, round(MINIMUM_SECONDS / max(warm, 1e-6)))))
        if warm > LONG_SECONDS:
            rounds = min(rounds, LONG_ROUNDS)
    samples: list[list[float]] = [[] for _ in functions]
    for turn in range(rounds):
        for place in range(len(functions)):
            i = (place + turn) % len(functions)
            samples[i].append(functions[i].sample(calls[i]) * 1e3)
    return [Measurement(*_middle(taken), rounds, count) for taken, count in zip(samples, calls, strict=True)]


def _middle(samples: list[float]) -> tuple[float, float]:
    """Median and interquartile range (largest less smallest where there are fewer than four)."""
    if len(samples) < 4:
        return statistics.median(samples), max(samples) - min(samples)
    first, _, third = statistics.quantiles(samples, n=4, method="inclusive")
    return statistics.median(samples), third - first
