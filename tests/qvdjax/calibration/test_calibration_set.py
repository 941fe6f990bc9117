"""Calibration sets: what is collected is read back, interrupted collections go on, damage is refused."""

import json

import numpy as np
import pytest

from qvdjax.calibration import CalibrationSet, Trajectory, collect
from qvdjax.errors import UserError

MADE_BY = {"model": "tiny", "steps": 5}
SAMPLES = [{"prompt": "a red disc", "seed": 3}, {"prompt": "a blue ring", "seed": 4}]


def trajectory(number: int) -> Trajectory:
    random = np.random.default_rng(number)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    return Trajectory(draw(5, 2, 4, 6, 3), np.linspace(999, 200, 5, dtype=np.float32), draw(7, 8), draw(7, 8))


def test_what_is_collected_is_read_back(tmp_path):
    calibration = collect(tmp_path / "set", MADE_BY, SAMPLES, trajectory)
    assert len(calibration) == 2
    for number in range(2):
        for name in ("latents", "timestep", "context", "negative_context"):
            expected = getattr(trajectory(number), name)
            np.testing.assert_array_equal(getattr(calibration.trajectory(number), name), expected)
    assert [entry["prompt"] for entry in calibration.manifest["samples"]] == ["a red disc", "a blue ring"]


def test_batches_cover_every_step_of_both_branches(tmp_path):
    calibration = collect(tmp_path / "set", MADE_BY, SAMPLES, trajectory)
    batches = list(calibration.batches(3))
    assert [len(batch["timestep"]) for batch in batches] == [3, 2] * 4
    first = trajectory(0)
    np.testing.assert_array_equal(np.concatenate([b["latents"] for b in batches[:2]]), first.latents)
    np.testing.assert_array_equal(np.concatenate([b["latents"] for b in batches[2:4]]), first.latents)
    np.testing.assert_array_equal(batches[0]["context"][1], first.context)
    np.testing.assert_array_equal(batches[2]["context"][1], first.negative_context)


def test_an_interrupted_collection_goes_on(tmp_path):
    made = []

    def make(number):
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt
        return trajectory(number)

    with pytest.raises(KeyboardInterrupt):
        collect(tmp_path / "set", MADE_BY, SAMPLES, make)
    with pytest.raises(UserError, match="lacks samples"):
        CalibrationSet.open(tmp_path / "set")
    collect(tmp_path / "set", MADE_BY, SAMPLES, make)
    assert made == [0, 1, 1]


def test_a_set_made_in_another_way_is_not_mixed(tmp_path):
    collect(tmp_path / "set", MADE_BY, SAMPLES, trajectory)
    with pytest.raises(UserError, match="another way"):
        collect(tmp_path / "set", {**MADE_BY, "steps": 6}, SAMPLES, trajectory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        collect(tmp_path / "other", MADE_BY, SAMPLES, trajectory)


def test_damage_is_refused(tmp_path):
    collect(tmp_path / "set", MADE_BY, SAMPLES, trajectory)
    file = tmp_path / "set" / "sample-0001.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match="sample-0001"):
        CalibrationSet.open(tmp_path / "set").trajectory(1)
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "version": 9}))
    with pytest.raises(UserError, match="version"):
        CalibrationSet.open(tmp_path / "set")
    with pytest.raises(UserError, match="manifest"):
        CalibrationSet.open(tmp_path)
