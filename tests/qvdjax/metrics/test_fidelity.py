import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qvdjax.metrics import PSNR_CEILING, psnr, relative_error, ssim


def frames(seed: int, shape=(2, 3, 17, 14, 3)) -> np.ndarray:
    """Smooth random frames (batch, frames, height, width, channels), correlated between neighbours."""
    noise = np.random.default_rng(seed).uniform(size=shape)
    smooth = (noise + np.roll(noise, 1, axis=-3) + np.roll(noise, 1, axis=-2)) / 3
    return np.clip(smooth, 0, 1)


@pytest.mark.parametrize("peak", [1.0, 255.0])
def test_ssim_equals_scikit_image(peak):
    video, reference = peak * frames(0), peak * frames(1)
    expected = [
        [
            structural_similarity(
                a,
                b,
                data_range=peak,
                channel_axis=-1,
                gaussian_weights=True,
                sigma=1.5,
                use_sample_covariance=False,
            )
            for a, b in zip(first, second, strict=True)
        ]
        for first, second in zip(video, reference, strict=True)
    ]
    # Both are float64; E[x^2] - E[x]^2 loses about three digits against c2 = 9e-4, so 1e-12 leaves room.
    np.testing.assert_allclose(ssim(video, reference, peak=peak), expected, rtol=0, atol=1e-12)


def test_psnr_equals_scikit_image():
    video, reference = frames(0), frames(1)
    expected = [
        [peak_signal_noise_ratio(b, a, data_range=1.0) for a, b in zip(first, second, strict=True)]
        for first, second in zip(video, reference, strict=True)
    ]
    # One float64 mean over 714 values and a logarithm.
    np.testing.assert_allclose(psnr(video, reference), expected, rtol=1e-12)


def test_psnr_of_a_known_offset():
    # An error of 0.1 everywhere is a mean squared error of 0.01, 20 dB below the peak of 1.
    reference = np.full((4, 8, 8, 3), 0.4)
    np.testing.assert_allclose(psnr(reference + 0.1, reference), np.full(4, 20.0), rtol=1e-12)


def test_equal_frames_reach_the_ceiling_and_one():
    video = frames(3)
    assert (psnr(video, video) == PSNR_CEILING).all()
    # The numerator and the denominator are the same sums, added in another order.
    np.testing.assert_allclose(ssim(video, video), 1.0, rtol=1e-12)


@pytest.mark.parametrize(("height", "width", "side"), [(8, 20, 7), (7, 7, 7), (1, 4, 1), (12, 10, 9)])
def test_small_frames_use_the_largest_odd_window(height, width, side):
    """Against the definition written out: weighted moments in every window, no separable filter."""
    a, b = (np.random.default_rng(s).uniform(size=(height, width)) for s in (0, 1))
    offsets = np.arange(side) - side // 2
    weights = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    weights /= weights.sum()
    values = []
    for top in range(height - side + 1):
        for left in range(width - side + 1):
            x, y = (image[top : top + side, left : left + side] for image in (a, b))
            mean_x, mean_y = (weights * x).sum(), (weights * y).sum()
            variance_x, variance_y = (weights * (x - mean_x) ** 2).sum(), (weights * (y - mean_y) ** 2).sum()
            covariance = (weights * (x - mean_x) * (y - mean_y)).sum()
            values.append(
                (2 * mean_x * mean_y + 1e-4)
                * (2 * covariance + 9e-4)
                / ((mean_x**2 + mean_y**2 + 1e-4) * (variance_x + variance_y + 9e-4))
            )
    # Cancellation in E[x^2] - E[x]^2 costs about 1e-16 against c2 = 9e-4.
    np.testing.assert_allclose(ssim(a[..., None], b[..., None]), np.mean(values), rtol=0, atol=1e-11)


@given(st.integers(0, 2**31), st.floats(1e-3, 0.3), st.floats(1.1, 4.0))
def test_more_noise_is_worse(seed, noise, factor):
    reference = frames(seed, (1, 24, 24, 3))
    error = np.random.default_rng(seed + 1).standard_normal(reference.shape)
    near, far = reference + noise * error, reference + factor * noise * error
    assert psnr(near, reference) > psnr(far, reference)
    assert ssim(near, reference) > ssim(far, reference)


@given(st.integers(0, 2**31))
def test_ssim_is_symmetric_and_bounded(seed):
    a, b = frames(seed, (1, 12, 12, 3)), frames(seed + 1, (1, 12, 12, 3))
    assert ssim(a, b) == ssim(b, a)
    assert -1 <= ssim(a, b).item() < 1


def test_relative_error_of_a_scaled_tensor():
    reference = jax.random.normal(jax.random.key(0), (3, 4, 5))
    # (1.1 x - x) loses about four digits of float32 to cancellation: 0.01 to 1e-4 relative.
    np.testing.assert_allclose(relative_error(1.1 * reference, reference), 0.01, rtol=1e-4)
    per_sample = jax.jit(lambda a, b: relative_error(a, b, axis=(1, 2)))(1.1 * reference, reference)
    assert per_sample.shape == (3,)
    np.testing.assert_allclose(per_sample, 0.01, rtol=1e-4)
    assert relative_error(reference, reference) == 0


def test_relative_error_counts_in_float32_for_narrow_types():
    # bf16 cannot count past 256 in steps of one: the sum of 4096 squares needs float32.
    reference = jnp.ones((4096,), jnp.bfloat16)
    result = relative_error(2 * reference, reference)
    assert result == 1
    assert result.dtype == jnp.float32


def test_relative_error_of_a_zero_reference():
    zeros = np.zeros((2, 3), np.float32)
    assert relative_error(zeros, zeros) == 0
    assert np.isinf(relative_error(zeros + 1, zeros))


@pytest.mark.parametrize("measure", [psnr, ssim, relative_error])
def test_shapes_must_agree(measure):
    with pytest.raises(ValueError, match="shapes differ"):
        measure(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 9, 3)))


@pytest.mark.parametrize("measure", [psnr, ssim])
def test_frames_need_three_axes(measure):
    with pytest.raises(ValueError, match="height, width, channels"):
        measure(np.zeros((8, 8)), np.zeros((8, 8)))
