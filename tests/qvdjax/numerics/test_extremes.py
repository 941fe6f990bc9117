"""Extremes whose gradients stay finite: values, gradients, ties, and no division by a count that may be zero."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.numerics import Quantizer
from qvdjax.numerics.extremes import largest, smallest

PAIRS = [(smallest, jnp.min), (largest, jnp.max)]


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
@pytest.mark.parametrize("axis", [-1, -2, 0, 2])
def test_values_and_gradients_are_those_of_jax_where_one_entry_is_extreme(ours, plain, axis):
    x, weights = jax.random.normal(jax.random.key(0), (2, 3, 5, 7))
    weights = plain(weights, axis=axis)
    chex.assert_trees_all_equal(ours(x, axis), plain(x, axis=axis))
    gradients = [
        jax.grad(lambda x, f=f: (f(x) * weights).sum())(x) for f in (lambda x: ours(x, axis), lambda x: plain(x, axis))
    ]
    chex.assert_trees_all_equal(*gradients)
    chex.assert_numerical_grads(lambda x: ours(x, axis), (x,), order=1, atol=1e-2, rtol=1e-2)  # float32 differences


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_the_first_of_several_gets_the_whole_gradient(ours, plain):
    x = jnp.array([[2.0, -1.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0]])
    gradient = jax.grad(lambda x: ours(x, -1).sum())(x)
    np.testing.assert_array_equal(gradient.sum(axis=-1), [1.0, 1.0])
    assert np.count_nonzero(gradient) == 2
    assert gradient[0, 1 if ours is smallest else 0] == gradient[1, 0] == 1


@pytest.mark.parametrize(("ours", "plain"), PAIRS)
def test_infinities_and_nan_pass(ours, plain):
    x = jnp.array([[1.0, jnp.inf, -jnp.inf], [1.0, jnp.nan, 2.0]])
    np.testing.assert_array_equal(ours(x, -1), plain(x, axis=-1))


@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_no_gradient_of_a_range_divides_by_how_many_entries_equal_it(granularity):
    """Computed anew in the backward pass to another last bit, none may: this was 0 / 0 in a training run."""
    quantizer = Quantizer(4, symmetric=False, granularity=granularity, dynamic=True)
    x = jax.random.normal(jax.random.key(0), (3, 8))
    total = lambda x: sum(end.sum() for end in quantizer.range_of(x))  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(total))(x))
    assert "div" not in program, program
    assert "div" in str(jax.make_jaxpr(jax.grad(lambda x: x.max(axis=-1).sum()))(x))  # jax's own does
