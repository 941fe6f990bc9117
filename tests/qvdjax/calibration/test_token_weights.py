"""Token weights: equation 11 by hand, ranks, padding and text left out."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.calibration.token_weights import TokenWeights

ALL = slice(0, 5)


def test_minmax_as_published():
    received = jnp.array([[1.0, 3.0, 2.0, 5.0, 1.5], [2.0, 2.0, 2.0, 2.0, 2.0]])
    found = TokenWeights(least=0.5).of(received, ALL)
    np.testing.assert_allclose(found[0], [0.5, 0.75, 0.625, 1.0, 0.5625], rtol=1e-6)
    np.testing.assert_allclose(found[1], 0.5)  # none stands out


def test_percentiles_do_not_feel_one_large_token():
    received = jnp.array([[1.0, 3.0, 2.0, 5000.0, 1.5]])
    found = TokenWeights("percentile", 0.2).of(received, ALL)
    np.testing.assert_allclose(found, [[0.2, 0.8, 0.6, 1.0, 0.4]], rtol=1e-5)
    published = TokenWeights("minmax", 0.2).of(received, ALL)
    assert published[0, :3].max() < 0.201  # which is why there is a choice


@pytest.mark.parametrize("normalisation", ["minmax", "percentile"])
def test_padding_and_text_weigh_nothing_and_change_nothing(normalisation):
    received = jnp.array([[1.0, 3.0, 2.0, 0.0, 0.0]])
    found = TokenWeights(normalisation).of(received, ALL)
    np.testing.assert_allclose(found, [[0.5, 1.0, 0.75, 0, 0]], rtol=1e-6)
    text_first = TokenWeights(normalisation, text=False).of(jnp.array([[9.0, 8.0, 1.0, 3.0, 2.0]]), slice(2, 5))
    np.testing.assert_allclose(text_first, [[0, 0, 0.5, 1.0, 0.75]], rtol=1e-6)


def test_bad_weights_are_refused():
    with pytest.raises(ValueError, match="percentile"):
        TokenWeights("softmax")
    with pytest.raises(ValueError, match="0 to 1"):
        TokenWeights(least=1.5)
