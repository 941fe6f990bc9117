"""VBench's normalisation and totals, from the raw scores of its sixteen dimensions.

The scores themselves are made by VBench's own program, which needs a dozen networks; this is the arithmetic on top,
read in Vchitect/VBench `scripts/constant.py` and `scripts/cal_final_score.py` (arXiv 2311.17982).
"""

import dataclasses
import math
from collections.abc import Mapping

from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Dimension:
    """One of VBench's.

    Attributes:
        group: "quality" or "semantic".
        low, high: Raw scores that become 0 and 1; what lies outside is not clipped.
        weight: Within its group.
    """

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 0.1462),
    "background_consistency": Dimension("quality", 0.2615),
    "temporal_flickering": Dimension("quality", 0.6293),
    "motion_smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", weight=0.5),
    "aesthetic_quality": Dimension("quality"),
    "imaging_quality": Dimension("quality"),
    "object_class": Dimension("semantic"),
    "multiple_objects": Dimension("semantic"),
    "human_action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial_relationship": Dimension("semantic"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance_style": Dimension("semantic", 0.0009, 0.2855),
    "temporal_style": Dimension("semantic", 0.0, 0.364),
    "overall_consistency": Dimension("semantic", 0.0, 0.364),
}
GROUP_WEIGHTS = {"quality": 4.0, "semantic": 1.0}


@dataclasses.dataclass(frozen=True)
class VBenchScores:
    """What raw scores amount to.

    Attributes:
        normalised: Of each dimension that was given; 1 is the best that the authors think of.
        groups: "quality" and "semantic", None where a dimension of it is missing.
        total: (4 quality + semantic) / 5, None where a group is.
        missing: Dimensions that were not given.
    """

    normalised: Mapping[str, float]
    groups: Mapping[str, float | None]
    total: float | None
    missing: tuple[str, ...]


def vbench_scores(raw: Mapping[str, float]) -> VBenchScores:
    """Normalise raw scores and weigh them together.

    VBench's own script takes a dimension that is missing for 0; here what it would go into is left out.

    Args:
        raw: Scores by dimension ("subject_consistency", or with spaces).

    Raises:
        UserError: An unknown dimension, one given twice, or a score that is no finite number.
    """
    named = {}
    for name, score in raw.items():
        dimension = name.replace(" ", "_")
        if dimension not in DIMENSIONS or dimension in named:
            what = "is given twice" if dimension in named else "is no dimension of VBench"
            raise UserError(f"{name!r} {what}", remedy=f"there are {', '.join(DIMENSIONS)}")
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            raise UserError(f"the score of {name!r} is {score!r}", remedy="it must be a finite number")
        named[dimension] = float(score)
    normalised = {
        name: (named[name] - scale.low) / (scale.high - scale.low)
        for name, scale in DIMENSIONS.items()
        if name in named
    }
    groups = {group: _mean(normalised, group) for group in GROUP_WEIGHTS}
    whole = None not in groups.values()
    total = sum(GROUP_WEIGHTS[group] * score for group, score in groups.items()) if whole else None
    return VBenchScores(
        normalised, groups, total / sum(GROUP_WEIGHTS.values()) if whole else None,
        tuple(name for name in DIMENSIONS if name not in named),
    )  # fmt: skip


def _mean(normalised: Mapping[str, float], group: str) -> float | None:
    weights = {name: scale.weight for name, scale in DIMENSIONS.items() if scale.group == group}
    if any(name not in normalised for name in weights):
        return None
    return sum(weight * normalised[name] for name, weight in weights.items()) / sum(weights.values())
