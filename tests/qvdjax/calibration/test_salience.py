"""Salience of channels by rank correlation, against SciPy-free NumPy in float64."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import wan, wan_inputs

from qvdjax.calibration.ranges import input_ranges
from qvdjax.calibration.salience import input_saliences, ranks, spearman
from qvdjax.errors import UserError
from qvdjax.nn import Linear, layers_of


def plain_ranks(values) -> np.ndarray:
    """By counting: how many are smaller, and half of the other equal ones."""
    values = np.asarray(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values], np.float64)


def plain_spearman(a, b) -> float:
    return float(np.corrcoef(plain_ranks(a), plain_ranks(b))[0, 1])


@hypothesis.given(values=st.lists(st.integers(0, 5), min_size=1, max_size=20))
@hypothesis.settings(max_examples=15, deadline=None)
def test_equal_values_share_a_rank(values):
    found = ranks(jnp.asarray(np.resize(values, 20), jnp.float32))  # one length, one program
    np.testing.assert_array_equal(found, plain_ranks(np.resize(values, 20)))


@hypothesis.given(seed=st.integers(0, 1000), levels=st.sampled_from([3, 1000]))
@hypothesis.settings(max_examples=10, deadline=None)
def test_rank_correlation(seed, levels):
    a, b = np.random.default_rng(seed).integers(0, levels, (2, 31)).astype(np.float32)
    # Float32 sums of 31 products of half-integers below 31 squared.
    assert float(spearman(jnp.asarray(a), jnp.asarray(b))) == pytest.approx(plain_spearman(a, b), abs=1e-5)


def test_order_alone_counts_and_nothing_to_order_is_no_correlation():
    a = jnp.array([0.1, 2.0, 30.0, 4.0])
    assert float(spearman(a, a**3)) == pytest.approx(1, abs=1e-6)
    assert float(spearman(a, -a)) == pytest.approx(-1, abs=1e-6)
    assert float(spearman(a, jnp.ones(4))) == 0


def test_it_is_the_published_mean_over_inputs():
    """Ranges of single inputs say what the largest magnitudes are; the formula is then a few lines of float64."""
    model, batches = wan(num_layers=2), [wan_inputs(batch=2, seed=1), wan_inputs(batch=1, seed=2)]
    rows = [{k: v[i : i + 1] for k, v in one.items()} for one in batches for i in range(len(one["latents"]))]
    each = [input_ranges(model, [row]) for row in rows]
    found = input_saliences(model, batches)
    weights = {}
    for names, _, layer in layers_of(model, (Linear,)):
        stacked = np.asarray(layer.weight[...]).reshape(len(names), *layer.weight[...].shape[-2:])
        weights.update(zip(names, stacked, strict=True))
    assert set(found) == set(weights)
    apart = 0
    for name, weight in weights.items():
        largest = np.array([np.maximum(-low, high) for low, high in (one[name] for one in each)], np.float64)
        rho = np.array([plain_spearman(row, np.abs(weight).max(axis=0)) for row in largest])
        eta = np.exp(-rho) / np.exp(-rho).sum()
        low, high = found[name]
        # Batches of another size are other float32 programs: their inputs differ by some 1e-6, and a pair of ranks may.
        np.testing.assert_allclose(high, eta @ largest, rtol=1e-3)
        np.testing.assert_array_equal(low, -high)
        apart += float(np.ptp(eta)) > 0.01
    assert apart > len(weights) // 2  # inputs are weighed differently: the formula was tried, not a plain mean


def test_what_is_refused():
    with pytest.raises(UserError, match="empty"):
        input_saliences(wan(num_layers=1), [])
    broken = wan_inputs(batch=1)
    broken["latents"] = broken["latents"].at[..., 0].set(jnp.nan)
    with pytest.raises(UserError, match="not finite"):
        input_saliences(wan(num_layers=1), [broken])
