"""Rotary positions: the two ways to turn pairs of neighbouring features agree."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.kernels import Device
from qvdjax.nn import embeddings


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "head_dim"), [(5, 10), (24, 128)])  # the second in tiles
def test_neighbours_change_places_by_a_product_or_by_taking_them_apart(monkeypatch, dtype, tokens, head_dim):
    x = jax.random.normal(jax.random.key(0), (2, tokens, 3, head_dim)).astype(dtype)
    angles = jax.random.uniform(jax.random.key(1), (tokens, head_dim // 2), maxval=6.0)
    apart = embeddings.rotate_adjacent_pairs(x, jnp.cos(angles), jnp.sin(angles))
    monkeypatch.setattr(embeddings, "target", lambda: Device("tpu", "TPU v5 lite"))
    product = embeddings.rotate_adjacent_pairs(x, jnp.cos(angles), jnp.sin(angles))
    assert product.dtype == dtype
    # The product moves numbers exactly; a fused multiply-add may round once less, and bfloat16 may round either way.
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(
        *(np.asarray(a, np.float32) for a in (product, apart)), atol=tolerance, rtol=tolerance
    )  # fmt: skip
