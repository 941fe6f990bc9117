"""Codebooks: codes that stand for levels which are not evenly spaced, held as small integers all the same."""

import functools
import math
import statistics

import numpy as np

CODEBOOKS = ("gaussian",)
LARGEST_LEVEL = 127
MOST_BITS = 7  # those next to zero lie a whole number apart with 128 levels, half of one with 256
_TURNS = 2000


@functools.cache
def levels(codebook: str, bits: int) -> tuple[tuple[int, ...], float]:
    """The levels of a codebook's codes, ascending, as whole numbers of -127 to 127, and what one of these stands for.

    "gaussian" has the levels of least squared error for a normal distribution of variance one (Lloyd 1982, Max 1960),
    the largest of which becomes 127. Products of such levels are products of int8; rounding them to whole numbers costs
    at most 1/254 of the largest level.

    Args:
        codebook: One of `CODEBOOKS`.
        bits: Of a code, at most `MOST_BITS`; there are 2**bits levels.

    Returns:
        The whole numbers, and the step: level = whole number x step, in standard deviations.
    """
    if codebook not in CODEBOOKS:
        raise ValueError(f"unknown codebook {codebook!r}: use one of {', '.join(CODEBOOKS)}")
    if bits > MOST_BITS:
        raise ValueError(f"a codebook of {bits} bits has more levels than int8 can tell apart: use an even grid")
    count = 2**bits
    # Panter and Dite's: for many levels the best ones are quantiles of a distribution three times as wide.
    normal = statistics.NormalDist(0, math.sqrt(3))
    found = np.array([normal.inv_cdf((number + 0.5) / count) for number in range(count)])
    for _ in range(_TURNS):
        found = _centroids((found[1:] + found[:-1]) / 2)
    step = found[-1] / LARGEST_LEVEL
    return tuple(int(level) for level in np.rint(found / step)), float(step)


def _centroids(edges: np.ndarray) -> np.ndarray:
    """The mean of a normal distribution between neighbouring edges, and beyond the first and the last."""
    cumulative = np.array([0.0, *(0.5 * math.erfc(-edge / math.sqrt(2)) for edge in edges), 1.0])
    density = np.array([0.0, *np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi), 0.0])
    return -np.diff(density) / np.diff(cumulative)
