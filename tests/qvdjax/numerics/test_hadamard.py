"""Hadamard matrices of all widths that published models have, and rotations of any width."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.numerics import hadamard

PUBLISHED = (1536, 1920, 2048, 3072, 5120, 7680, 8960, 12288, 13824)


@pytest.mark.parametrize("order", [1, 2, 4, 12, 20, 24, 60, 96, 108, 140, 256])
def test_rows_are_orthogonal(order):
    h = hadamard.matrix(order).astype(np.int64)
    assert set(np.unique(np.abs(h))) == {1}
    np.testing.assert_array_equal(h @ h.T, order * np.eye(order, dtype=np.int64))


def test_published_widths_are_rotated_whole():
    assert all(hadamard.largest_order(width) == width for width in PUBLISHED)
    assert hadamard.factors(5120) == (40, 128)
    assert hadamard.multiply_adds(5120, 5120) == 5120 * 168
    assert hadamard.largest_order(5120, 1000) == 640


@pytest.mark.parametrize(("width", "order"), [(7, 1), (35, 1), (14, 2), (66, 2), (72, 72), (130, 2), (90, 2)])
def test_other_widths_are_rotated_in_blocks(width, order):
    assert hadamard.largest_order(width) == order


def test_orders_that_are_not_built_are_refused():
    with pytest.raises(ValueError, match="order 6"):
        hadamard.matrix(6)


@hypothesis.given(width=st.integers(1, 200), most=st.none() | st.integers(1, 64))
@hypothesis.settings(max_examples=15)
def test_a_rotation_is_the_product_with_the_matrix_and_has_an_inverse(width, most):
    order = hadamard.largest_order(width, most)
    x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(np.float32)
    first, last = hadamard.factors(order)
    block = np.kron(hadamard.matrix(first), hadamard.matrix(last)) / np.sqrt(order)
    whole = np.kron(np.eye(width // order), block)
    rotated = hadamard.rotate(x, order)
    # Sums of at most 200 float32 terms near 1.
    np.testing.assert_allclose(rotated, x @ whole.T, atol=2e-5)
    np.testing.assert_allclose(hadamard.rotate(rotated, order, inverse=True), x, atol=2e-5)


def test_bfloat16_is_summed_in_float32():
    x = jax.random.normal(jax.random.key(0), (5, 96)).astype(jnp.bfloat16)
    rotated = hadamard.rotate(x, 96)
    assert rotated.dtype == jnp.float32
    # The first product is rounded to float32 only, the second reads it so: no bfloat16 in between on this machine.
    np.testing.assert_allclose(rotated, hadamard.rotate(x.astype(jnp.float32), 96), atol=1e-5)
