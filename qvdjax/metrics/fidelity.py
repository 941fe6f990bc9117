"""Fidelity to a reference: relative squared error of tensors, PSNR and SSIM of frames.

PSNR and SSIM run in NumPy and float64 on the host: their value must not depend on the accelerator, whose
default matrix precision is lower than float32.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

PSNR_CEILING = 100.0
"""Decibels reported for equal frames, whose PSNR is infinite: JSON has no infinity, and one equal frame
must not swallow a mean. It corresponds to a root mean square error of 1e-5 of the peak, 400 times finer
than 8-bit colour."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def relative_error(estimate, reference, axis: int | Sequence[int] | None = None):
    """Relative squared error ||estimate - reference||^2 / ||reference||^2.

    Works inside `jax.jit` on JAX arrays, and on NumPy arrays. Sums are taken in float32 or better.

    Args:
        estimate, reference: arrays of one shape.
        axis: axes the norms run over (all by default); the others stay.

    Returns:
        float32 or float64 array of the axes that stay. Where the reference is all zeros it is 0 for an equal
        estimate and infinite otherwise.

    Raises:
        ValueError: the shapes differ.
    """
    import jax.numpy as jnp

    if np.shape(estimate) != np.shape(reference):
        raise ValueError(f"shapes differ: {np.shape(estimate)} and {np.shape(reference)}")
    dtype = jnp.promote_types(jnp.result_type(estimate, reference), jnp.float32)
    estimate, reference = jnp.asarray(estimate, dtype), jnp.asarray(reference, dtype)
    axis = tuple(axis) if isinstance(axis, Sequence) else axis
    error = jnp.sum(jnp.square(estimate - reference), axis=axis)
    power = jnp.sum(jnp.square(reference), axis=axis)
    # 0 / 0 is no error; the inner `where` keeps the division itself free of NaN, also in its gradient.
    quotient = error / jnp.where(power == 0, 1, power)
    return jnp.where(power == 0, jnp.where(error == 0, 0.0, jnp.inf), quotient)


def psnr(video: ArrayLike, reference: ArrayLike, *, peak: float = 1.0, ceiling: float = PSNR_CEILING) -> np.ndarray:
    """Peak signal-to-noise ratio of every frame: 10 log10(peak^2 / mean squared error), decibels.

    A video's PSNR is the mean over its frames, as the video quantization papers report it.

    Args:
        video, reference: (..., height, width, channels), values from 0 to `peak`.
        peak: the largest value a channel can take.
        ceiling: what equal frames get, and the most any frame gets (see `PSNR_CEILING`).

    Returns:
        float64 (...): one value a frame.

    Raises:
        ValueError: the shapes differ or have fewer than three axes.
    """
    video, reference = _frames(video, reference)
    # (..., height, width, channels) -> (...)
    error = np.mean(np.square(video - reference), axis=(-3, -2, -1))
    floor = peak**2 / 10 ** (ceiling / 10)
    return 10 * np.log10(peak**2 / np.maximum(error, floor))


def ssim(video: ArrayLike, reference: ArrayLike, *, peak: float = 1.0) -> np.ndarray:
    """Structural similarity of every frame (Wang, Bovik, Sheikh, Simoncelli 2004, equations 13 to 17).

    The paper's settings: Gaussian window 11 x 11 with sigma 1.5 that sums to one, K1 = 0.01, K2 = 0.03, only
    positions where the window lies inside the frame. The paper is about grey images; here colour channels are
    measured one by one and averaged, as scikit-image does with `channel_axis`. The automatic downsampling
    of the authors' later script is not done.

    Frames with a side under 11 use the largest odd window that fits, same sigma, again normalised to one;
    such values are comparable with each other, not with those of larger frames.

    Args:
        video, reference: (..., height, width, channels), values from 0 to `peak`.
        peak: the largest value a channel can take.

    Returns:
        float64 (...): one value a frame, at most 1.

    Raises:
        ValueError: the shapes differ or have fewer than three axes.
    """
    video, reference = _frames(video, reference)
    leading = video.shape[:-3]
    pairs = zip(
        # (..., h, w, c) -> (frames, h, w, c); one frame at a time bounds the memory
        video.reshape(-1, *video.shape[-3:]),
        reference.reshape(-1, *reference.shape[-3:]),
        strict=True,
    )
    return np.array([_ssim_frame(a, b, peak) for a, b in pairs]).reshape(leading)


def _ssim_frame(a: np.ndarray, b: np.ndarray, peak: float) -> float:
    """SSIM of one frame (height, width, channels)."""
    side = min(SSIM_WINDOW, *a.shape[:2])
    window = _gaussian_window(side - (side + 1) % 2)
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    variance_a = _blur(a * a, window) - mean_a**2
    variance_b = _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return float(np.mean(luminance * structure))


def _gaussian_window(size: int) -> np.ndarray:
    offsets = np.arange(size) - (size - 1) / 2
    weights = np.exp(-0.5 * (offsets / SSIM_SIGMA) ** 2)
    return weights / weights.sum()


def _blur(image: np.ndarray, window: np.ndarray) -> np.ndarray:
    """Separable filter without padding: (height, width, c) -> (height - n + 1, width - n + 1, c)."""
    for axis in (0, 1):
        length = image.shape[axis] - len(window) + 1
        image = sum(
            weight * np.take(image, range(start, start + length), axis=axis) for start, weight in enumerate(window)
        )
    return image


def _frames(video: ArrayLike, reference: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    video, reference = np.asarray(video, np.float64), np.asarray(reference, np.float64)
    if video.shape != reference.shape:
        raise ValueError(f"shapes differ: {video.shape} and {reference.shape}")
    if video.ndim < 3:
        raise ValueError(f"frames are (..., height, width, channels), got shape {video.shape}")
    return video, reference
