"""The Fréchet distance between two sets of features, each taken for a Gaussian (arXiv 1706.08500, equation 6)."""

import numpy as np

from qvdjax.errors import UserError


def frechet_distance(one: np.ndarray, other: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of means and covariances, computed in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric: no
    root of a matrix that is not, with its imaginary parts, is needed.

    Args:
        one, other: (samples, features), at least two samples each.

    Raises:
        UserError: Other shapes, or values that are not finite.
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise UserError(
            f"features of shapes {one.shape} and {other.shape} have no Fréchet distance",
            remedy="give (samples, features), at least two samples of each",
        )
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise UserError("features are not finite", remedy="look for videos that are all of one colour, or damaged")
    means = one.mean(axis=0) - other.mean(axis=0)
    first, second = (np.atleast_2d(np.cov(features, rowvar=False)) for features in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.sqrt(np.linalg.eigvalsh(root @ second @ root).clip(min=0)).sum()
    return float(means @ means + np.trace(first) + np.trace(second) - 2 * shared)
