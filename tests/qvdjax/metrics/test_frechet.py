"""The Fréchet distance against its closed form and a general root of a matrix."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from qvdjax.errors import UserError
from qvdjax.metrics.frechet import frechet_distance

RANDOM = np.random.default_rng(0)


def test_against_the_root_of_the_product():
    one = RANDOM.standard_normal((40, 7)) @ RANDOM.standard_normal((7, 7))
    other = RANDOM.standard_normal((30, 7)) @ RANDOM.standard_normal((7, 7)) + 2
    first, second = (np.cov(features, rowvar=False) for features in (one, other))
    root = sqrtm(first @ second).real
    means = one.mean(axis=0) - other.mean(axis=0)
    expected = means @ means + np.trace(first + second - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)  # float64, seven features


def test_of_fewer_samples_than_features():
    features = RANDOM.standard_normal((5, 20))
    # Covariances of rank 4. The root of a rounding error of 1e-15 is 3e-8, sixteen times over.
    assert abs(frechet_distance(features, features)) < 1e-5
    assert frechet_distance(features, features + 3) == pytest.approx(20 * 9, rel=1e-6)
    assert frechet_distance(features[:, :1], 2 * features[:, :1]) > 0


@pytest.mark.parametrize("other", [np.zeros((5, 6)), np.zeros((1, 7)), np.zeros(7), np.full((5, 7), np.nan)])
def test_what_has_no_distance_is_said(other):
    with pytest.raises(UserError, match="have no Fréchet distance|not finite"):
        frechet_distance(np.zeros((5, 7)), other)
