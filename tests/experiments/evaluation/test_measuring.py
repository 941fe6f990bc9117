import numpy as np
import pytest

from experiments.evaluation.measuring import compare_runs, temporal_measures
from experiments.evaluation.runs import FreeRun
from qvdjax.errors import UserError
from qvdjax.metrics import PSNR_CEILING


def arrays(seed: int, steps: int = 4, samples: int = 3):
    """A free run, velocities at its inputs, and a video."""
    rng = np.random.default_rng(seed)
    shape = (samples, 2, 3, 4, 5)
    run = FreeRun(
        rng.standard_normal((steps, *shape)).astype(np.float32), rng.standard_normal(shape).astype(np.float32)
    )
    velocity = rng.standard_normal((steps, *shape)).astype(np.float32)
    return run, velocity, rng.uniform(size=(samples, 2, 12, 12, 3))


def test_known_differences():
    run, velocity, video = arrays(0)
    # 10 % too large at the second step of the third sample, exact elsewhere.
    wrong = velocity.copy()
    wrong[1, 2] *= 1.1
    moved = FreeRun(run.inputs, 2 * run.latents)
    fidelity = compare_runs(run, velocity, moved, wrong, video, video)
    expected = np.zeros((4, 3))
    expected[1, 2] = 0.01
    # The difference of 1.1 v and v loses about four digits of float32.
    np.testing.assert_allclose(fidelity.teacher_forced, expected, rtol=1e-3)
    # Equal latents at every step, twice as large at the end: an error of one.
    np.testing.assert_array_equal(fidelity.trajectory, [[0] * 3] * 4 + [[1] * 3])
    np.testing.assert_array_equal(fidelity.psnr, [PSNR_CEILING] * 3)
    np.testing.assert_allclose(fidelity.ssim, 1, rtol=1e-12)


@pytest.mark.parametrize("where", ["reference", "candidate"])
def test_values_that_are_not_finite_are_named(where):
    run, velocity, video = arrays(0)
    broken = velocity.copy()
    broken[2, 1, 0, 0, 0, 0] = np.nan
    pair = (broken, velocity) if where == "reference" else (velocity, broken)
    with pytest.raises(UserError, match=f"the {where}'s velocity is not finite from step 3 of 4"):
        compare_runs(run, pair[0], run, pair[1], video, video)


def test_a_dead_reference_is_refused():
    run, velocity, video = arrays(0)
    with pytest.raises(UserError, match="all zeros"):
        compare_runs(run, np.zeros_like(velocity), run, velocity, video, video)


def test_temporal_measures_are_one_number_a_sample():
    video = np.zeros((2, 4, 8, 8, 3))
    video[1, ::2] = 1
    measures = temporal_measures(video)
    np.testing.assert_array_equal(measures["flicker"], [1, 0])
    np.testing.assert_array_equal(measures["frame_difference_energy"], [0, 1])
