import pytest

from experiments.evaluation import thresholds
from qvdjax.errors import UserError

METRICS = {
    "teacher_forced_error": {"mean": 0.1},
    "trajectory_error": {"mean": 0.2},
    "psnr": {"mean": 30.0},
    "ssim": {"mean": 0.9},
    "oracle": {"candidate": {"color": {"mean": 1.0}, "shape": {"mean": 0.5}, "direction": {"mean": 0.75}}},
    "weight_bytes": {"ratio": 0.3},
}


@pytest.mark.parametrize(
    ("name", "passes", "misses"),
    [
        ("max_teacher_forced_error", 0.1, 0.09),
        ("max_trajectory_error", 0.2, 0.1),
        ("min_psnr", 30, 31),
        ("min_ssim", 0.9, 0.91),
        ("min_color", 1, 1.1),
        ("min_shape", 0.5, 0.6),
        ("min_direction", 0.75, 0.8),
        ("max_bytes_ratio", 0.3, 0.25),
    ],
)
def test_each_threshold_has_its_side(name, passes, misses):
    assert thresholds.failures({name: passes}, METRICS) == []
    (line,) = thresholds.failures({name: misses}, METRICS)
    assert name in line
    assert f"{misses:g}" in line


def test_every_threshold_is_tested_above():
    tested = test_each_threshold_has_its_side.pytestmark[0].args[1]
    assert {name for name, *_ in tested} == set(thresholds.THRESHOLDS)


def test_min_oracle_is_all_three_and_gives_way_to_one_by_name():
    assert thresholds.expand({"min_oracle": 0.9, "min_shape": 0.4, "min_psnr": None}) == {
        "min_color": 0.9,
        "min_shape": 0.4,
        "min_direction": 0.9,
    }
    assert thresholds.expand(None) == {}


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match="min_beauty") as caught:
        thresholds.expand({"min_beauty": 1, "max_pain": 2})
    assert caught.value.items == ("max_pain", "min_beauty")


def test_oracle_thresholds_need_an_oracle():
    thresholds.check_measurable({"min_psnr": 1}, oracle_reason="no captions", video_reason=None)
    with pytest.raises(UserError, match="no captions"):
        thresholds.check_measurable({"min_color": 1}, oracle_reason="no captions", video_reason=None)
    with pytest.raises(UserError, match="no decoder"):
        thresholds.check_measurable({"min_ssim": 1}, oracle_reason=None, video_reason="no decoder")
