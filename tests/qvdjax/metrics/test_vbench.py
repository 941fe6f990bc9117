"""VBench's arithmetic against rows that were published with their totals."""

import pytest

from qvdjax.errors import UserError
from qvdjax.metrics.vbench import DIMENSIONS, vbench_scores

# In per cent: total, quality, semantic; then the dimensions in the order of `DIMENSIONS`. Rows of VBench's leaderboard
# of 2024 as remembered, not read again: a figure that was wrong by more than its rounding would not give these totals.
PUBLISHED = {
    "ModelScope": (
        75.75, 78.05, 66.54,
        89.87, 95.29, 98.28, 95.79, 66.39, 52.06, 58.57,
        82.25, 38.98, 92.40, 81.72, 33.68, 39.26, 23.39, 25.37, 25.67,
    ),
    "LaVie": (
        77.08, 78.78, 70.31,
        91.41, 97.47, 98.30, 96.38, 49.72, 54.94, 61.90,
        91.82, 33.32, 96.80, 86.39, 34.09, 52.69, 23.56, 25.93, 26.41,
    ),
    "Show-1": (
        78.93, 80.42, 72.98,
        95.53, 98.02, 99.12, 98.24, 44.44, 57.35, 58.66,
        93.07, 45.47, 95.60, 86.35, 53.50, 47.03, 23.06, 25.28, 27.46,
    ),
    "VideoCrafter1": (
        79.72, 81.59, 72.22,
        95.10, 98.04, 98.93, 95.67, 55.00, 62.67, 65.46,
        78.18, 45.66, 91.60, 93.32, 58.86, 43.75, 24.41, 25.54, 26.76,
    ),
    "VideoCrafter2": (
        80.44, 82.20, 73.42,
        96.85, 98.22, 98.41, 97.73, 42.50, 63.13, 67.22,
        92.55, 40.66, 95.00, 92.92, 35.86, 55.29, 25.13, 25.84, 28.23,
    ),
    "Gen-2": (
        80.58, 82.47, 73.03,
        97.61, 97.61, 99.56, 99.58, 18.89, 66.96, 67.42,
        90.92, 55.47, 89.20, 89.49, 66.91, 48.91, 19.34, 24.12, 26.17,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name):
    total, quality, semantic, *dimensions = PUBLISHED[name]
    scores = vbench_scores(dict(zip(DIMENSIONS, (score / 100 for score in dimensions), strict=True)))
    found = [100 * score for score in (scores.total, scores.groups["quality"], scores.groups["semantic"])]
    # Dimensions are rounded to 0.005; dividing by the narrowest range, 0.28, and averaging leaves less than 0.01, and
    # the totals are rounded to 0.005 themselves.
    assert found == pytest.approx([total, quality, semantic], abs=0.015)
    assert scores.missing == ()


def test_one_column_wrong_would_show():
    _, _, semantic, *dimensions = PUBLISHED["LaVie"]
    dimensions[7], dimensions[8] = dimensions[8] + 0.5, dimensions[7]
    scores = vbench_scores(dict(zip(DIMENSIONS, (score / 100 for score in dimensions), strict=True)))
    assert abs(100 * scores.groups["semantic"] - semantic) > 0.03


def test_what_is_missing_leaves_no_number():
    raw = {"subject consistency": 0.1462, "scene": 0.8222, "motion_smoothness": 1.0}
    scores = vbench_scores(raw)
    assert scores.normalised["subject_consistency"] == 0
    assert scores.normalised["scene"] == 1
    assert scores.normalised["motion_smoothness"] > 1  # not clipped, as in VBench
    assert (scores.total, scores.groups) == (None, {"quality": None, "semantic": None})
    assert len(scores.missing) == 13
    quality = {name: 0.5 for name, scale in DIMENSIONS.items() if scale.group == "quality"}
    scores = vbench_scores(quality)
    assert scores.groups["quality"] is not None
    assert scores.total is None


@pytest.mark.parametrize(("raw", "message"), [
    ({"beauty": 1.0}, "'beauty' is no dimension of VBench; there are subject_consistency"),
    ({"scene": float("nan")}, "the score of 'scene' is nan"),
    ({"scene": "high"}, "the score of 'scene' is 'high'"),
    ({"object class": 0.1, "object_class": 0.1}, "is given twice"),
])  # fmt: skip
def test_what_is_no_score_is_said(raw, message):
    with pytest.raises(UserError, match=message):
        vbench_scores(raw)
