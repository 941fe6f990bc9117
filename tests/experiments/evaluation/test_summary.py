import json

import numpy as np
import pytest

from experiments.evaluation import summary
from experiments.evaluation.measuring import Fidelity


def test_seeds_are_averaged_before_prompts():
    values = np.array([[1.0, 3.0, 10.0], [0.0, 2.0, 4.0]])  # (steps, samples): two seeds of prompt 0, one of 1
    np.testing.assert_array_equal(summary.per_prompt(values, (0, 0, 1)), [[2, 10], [1, 4]])


def test_entries_of_fidelity():
    fidelity = Fidelity(
        teacher_forced=np.array([[0.1, 0.3], [0.3, 0.5]]),
        trajectory=np.array([[0.0, 0.0], [0.2, 0.2], [0.4, 0.8]]),
        psnr=np.array([20.0, 30.0]),
        ssim=np.array([0.5, 0.7]),
    )
    entries = summary.fidelity_entries(fidelity, (0, 1), [1000, 500])
    # Binary fractions of tenths, added: the last bits may differ.
    assert entries["teacher_forced_error"]["per_prompt"] == pytest.approx([0.2, 0.4])
    assert entries["teacher_forced_error"]["mean"] == pytest.approx(0.3)
    assert entries["teacher_forced_error"]["by_step"]["mean"] == pytest.approx([0.2, 0.4])
    assert entries["teacher_forced_error"]["by_step"]["timesteps"] == [1000, 500]
    assert entries["trajectory_error"]["mean"] == pytest.approx(0.6)  # of the finished latents
    assert entries["trajectory_error"]["by_step"]["timesteps"] == [1000, 500, 0]
    assert entries["psnr"]["mean"] == 25
    assert entries["psnr"]["low"] == 20  # of two values, a quarter of the resamples are one of them twice
    json.dumps(entries, allow_nan=False)


def test_pairs_of_candidates():
    def metrics(*errors):
        entry = {"per_prompt": list(errors)}
        return {"teacher_forced_error": entry, "psnr": entry, "ssim": entry}

    rows = summary.paired_entries({"a": metrics(2, 3), "b": metrics(1, 1), "c": metrics(2, 3)})
    assert len(rows) == 3 * 3
    first = rows[0]
    assert (first["first"], first["second"], first["mean"]) == ("a", "b", 1.5)
    assert first["excludes_zero"]
    same = next(row for row in rows if (row["first"], row["second"]) == ("a", "c"))
    assert not same["excludes_zero"]
