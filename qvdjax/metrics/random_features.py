"""Fréchet distance between two sets of videos on fixed random features: no network was trained for it.

FVD is this distance on the features of a network trained to recognise actions (I3D), which is not shipped here. Random
convolutions see colours, edges and motion, and nothing of what a video means: the distance says whether two sets of
videos look alike in the mean and spread of such features, and is not to be compared with any published FVD.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

WIDTHS = (3, 16, 32, 64)  # of the video, and behind each layer
KERNEL, STRIDE = (3, 3, 3), (1, 2, 2)  # over frames, height and width
_SEED = 0
_AT_A_TIME = 8


@functools.cache
def _kernels() -> tuple[np.ndarray, ...]:
    """[*KERNEL, in, out] of each layer, float32: normal, of variance 2 / fan-in, which keeps the size behind a ReLU."""
    random, found = np.random.default_rng(_SEED), []
    for width, out in zip(WIDTHS[:-1], WIDTHS[1:], strict=True):
        spread = np.sqrt(2 / (width * np.prod(KERNEL)))
        found.append((spread * random.standard_normal((*KERNEL, width, out))).astype(np.float32))
    return tuple(found)


@jax.jit
def _features(video: jax.Array) -> jax.Array:
    x = 2 * video.astype(jnp.float32) - 1
    for kernel in _kernels():
        x = jax.lax.conv_general_dilated(
            x, kernel, STRIDE, "SAME", dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )  # fmt: skip
        x = jax.nn.relu(x)
    return x.mean(axis=(1, 2, 3))


def random_features(videos: ArrayLike) -> np.ndarray:
    """Videos (samples, frames, height, width, 3) in [0, 1] -> float64 [samples, 64]: three layers of random
    convolutions over space and time with ReLU, and the mean over all places."""
    videos = np.asarray(videos)
    if videos.ndim != 5 or videos.shape[-1] != WIDTHS[0]:
        raise ValueError(f"videos are (samples, frames, height, width, 3), not {videos.shape}")
    parts = [_features(videos[i : i + _AT_A_TIME]) for i in range(0, len(videos), _AT_A_TIME)]
    return np.concatenate([np.asarray(part, np.float64) for part in parts])


def frechet_distance(a: ArrayLike, b: ArrayLike) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of two sets of features [samples, features], in float64.

    m are means and C covariances. It is biased upwards by few samples, and as much for all sets of one size.

    Raises:
        ValueError: Fewer than two samples in a set.
    """
    sets = [np.asarray(one, np.float64) for one in (a, b)]
    if any(one.ndim != 2 or len(one) < 2 for one in sets):
        raise ValueError(f"two samples of each set are needed, got {[one.shape for one in sets]}")
    mean_a, mean_b = (one.mean(axis=0) for one in sets)
    first, second = (np.cov(one, rowvar=False) for one in sets)
    # tr (AB)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), a symmetric matrix whose eigenvalues are not negative.
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ second @ root)
    cross = np.sqrt(np.maximum(inner, 0)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def random_feature_distance(a: ArrayLike, b: ArrayLike) -> float:
    """The Fréchet distance of two sets of videos on these features."""
    return frechet_distance(random_features(a), random_features(b))
