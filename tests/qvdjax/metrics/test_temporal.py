import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvdjax.metrics import flicker, frame_difference_energy


def test_still_video_is_perfectly_steady():
    video = np.broadcast_to(np.random.default_rng(0).uniform(size=(1, 6, 5, 3)), (7, 6, 5, 3))
    assert flicker(video) == 1
    assert frame_difference_energy(video) == 0


def test_alternating_black_and_white():
    video = np.zeros((2, 5, 4, 4, 3))
    video[0, ::2] = 1
    np.testing.assert_array_equal(flicker(video), [0, 1])
    np.testing.assert_array_equal(frame_difference_energy(video), [1, 0])


def test_flicker_is_vbench_arithmetic():
    """VBench's own loop: float32 mean absolute difference of 8-bit neighbours, then of the pairs."""
    pixels = np.random.default_rng(1).integers(0, 256, (6, 9, 7, 3), dtype=np.uint8)
    pairs = [
        np.mean(np.abs(np.array(a, np.float32) - np.array(b, np.float32)))
        for a, b in zip(pixels[:-1], pixels[1:], strict=True)
    ]
    expected = (255.0 - np.mean(np.array(pairs)).item()) / 255.0
    # VBench averages 189 integers in float32: about 1e-6 relative.
    np.testing.assert_allclose(flicker(pixels / 255), expected, rtol=1e-6)


def test_flicker_sees_eight_bits():
    # A change of a fifth of an 8-bit level is not there in the file a viewer gets.
    video = np.full((2, 4, 4, 3), 100 / 255)
    video[1] += 0.2 / 255
    assert flicker(video) == 1


@given(st.integers(0, 2**31))
def test_measures_do_not_care_which_way_time_runs(seed):
    video = np.random.default_rng(seed).uniform(size=(2, 4, 3, 3, 3))
    # The same terms summed in reverse order, float64.
    np.testing.assert_allclose(flicker(video), flicker(video[:, ::-1]), rtol=1e-12)
    np.testing.assert_allclose(frame_difference_energy(video), frame_difference_energy(video[:, ::-1]), rtol=1e-12)
    assert ((flicker(video) >= 0) & (flicker(video) <= 1)).all()


@pytest.mark.parametrize("measure", [flicker, frame_difference_energy])
@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (8, 8, 3)])
def test_two_frames_are_needed(measure, shape):
    with pytest.raises(ValueError, match="two frames"):
        measure(np.zeros(shape))
