"""The Fréchet distance on random features: by its formula where that is known, and for what it is used."""

import numpy as np
import pytest

from qvdjax.metrics import frechet_distance, random_feature_distance, random_features

RANDOM = np.random.default_rng(0)


def test_the_distance_of_what_it_is_known_for():
    features = RANDOM.standard_normal((40, 5))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-9)  # float64, of traces of about 5
    assert frechet_distance(features, features + 2) == pytest.approx(5 * 4, rel=1e-9)  # the means alone
    # Covariances C and 9 C: tr(C + 9 C - 6 C) = 4 tr C.
    wide = features.mean(axis=0) + 3 * (features - features.mean(axis=0))
    assert frechet_distance(features, wide) == pytest.approx(4 * np.trace(np.cov(features, rowvar=False)), rel=1e-9)


def test_covariances_that_do_not_commute_follow_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    a, b = (RANDOM.standard_normal((30, 4)) @ RANDOM.standard_normal((4, 4)) for _ in range(2))
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    cross = linalg.sqrtm(first @ second).real
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(first + second - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-6)  # square roots of rounded eigenvalues
    assert frechet_distance(b, a) == pytest.approx(wanted, rel=1e-6)


def test_fewer_samples_than_features_are_no_trouble():
    features = RANDOM.standard_normal((6, 20))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)  # roots of eigenvalues of about 1e-16


def clips(samples: int, seed: int) -> np.ndarray:
    """A bright square at a random place of dim noise, which moves to the right."""
    random = np.random.default_rng(seed)
    videos = 0.1 * random.random((samples, 4, 12, 10, 3))
    for video in videos:
        top, left = random.integers(0, 8), random.integers(0, 4)
        for frame in range(4):
            video[frame, top : top + 3, left + frame : left + frame + 3] = 1
    return videos


def test_features_are_the_same_in_any_batch():
    videos = clips(11, 0)
    found = random_features(videos)
    assert found.shape == (11, 64)
    one = np.concatenate([random_features(video[None]) for video in videos])
    np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-6)  # float32 sums of up to 864 products


def test_what_looks_and_moves_alike_is_near():
    videos, others = clips(24, 0), clips(24, 1)
    same = random_feature_distance(videos, others)
    noisy = random_feature_distance(videos, np.clip(others + 0.2 * RANDOM.standard_normal(others.shape), 0, 1))
    still = random_feature_distance(videos, np.broadcast_to(others[:, :1], others.shape))
    assert same < 0.5 * min(noisy, still)


def test_what_is_refused():
    with pytest.raises(ValueError, match="two samples"):
        frechet_distance(np.zeros((1, 3)), np.zeros((4, 3)))
    with pytest.raises(ValueError, match="not \\(4, 8, 8, 3\\)"):
        random_features(np.zeros((4, 8, 8, 3)))
