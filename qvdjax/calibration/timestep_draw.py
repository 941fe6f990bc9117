"""Calibration inputs whose sampling steps are drawn from a normal distribution (PTQ4DM)."""

import dataclasses
from collections.abc import Iterator, Mapping

import numpy as np

from qvdjax.calibration.dataset import CalibrationSet

BATCH = 8


@dataclasses.dataclass(frozen=True)
class TimestepDraw:
    """How many inputs are drawn, and where in the course of sampling (arXiv 2211.15736).

    Steps are counted from the finished video, 0, to pure noise, T - 1. Each input is at a step of its own from
    N(mean T, (deviation T)^2), rounded and clipped, so that more are near the finished video than near noise.
    Samplers' steps are taken for timesteps; where they are evenly spaced this is the same.

    Attributes:
        count: Inputs, each with the prompt and with the negative prompt.
        mean, deviation: As shares of T (the release: 0.4 and 0.4).
        seed: Of the draw.
    """

    count: int = 128
    mean: float = 0.4
    deviation: float = 0.4
    seed: int = 0

    def __post_init__(self):
        if self.count < 1:
            raise ValueError(f"at least one sample has to be drawn, not {self.count}")
        if self.deviation < 0:
            raise ValueError(f"a deviation of {self.deviation} makes no sense")

    def places(self, steps: tuple[int, ...]) -> list[tuple[int, int]]:
        """(sample, step) of each input, by sample; `steps` are the numbers of steps of each sample.

        Samples take turns in an order of their own, so that each has as many inputs as any other, but for one. A place
        may be drawn more than once, and then counts as often.
        """
        random = np.random.default_rng(self.seed)
        order = random.permutation(len(steps))
        places = []
        for number in range(self.count):
            sample = int(order[number % len(order)])
            total = steps[sample]
            before_end = np.clip(np.rint(random.normal(self.mean * total, self.deviation * total)), 0, total - 1)
            places.append((sample, total - 1 - int(before_end)))
        return sorted(places)


@dataclasses.dataclass(frozen=True)
class DrawnInputs:
    """Batches of the drawn inputs, those of a sample together.

    Attributes:
        calibration: Where they are read from, anew each time.
        places: (sample, step) of each, by sample.
    """

    calibration: CalibrationSet
    places: tuple[tuple[int, int], ...]

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        steps: dict[int, list[int]] = {}
        for sample, step in self.places:
            steps.setdefault(sample, []).append(step)
        for sample, numbers in steps.items():
            yield from self.calibration.trajectory(sample).inputs(numbers, BATCH)


def draw(calibration: CalibrationSet, how: TimestepDraw) -> DrawnInputs:
    """The inputs that are drawn from a calibration set."""
    steps = tuple(len(calibration.trajectory(number).timestep) for number in range(len(calibration)))
    return DrawnInputs(calibration, tuple(how.places(steps)))
