"""Grids of temporal features against their closed forms, and the measures by which one is chosen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvdjax.metrics.temporal_features import discriminability
from qvdjax.numerics import FeatureGrid, Grid, fake_quantize, to_levels
from qvdjax.ptq.feature_grids import ChooseGrid

KINDS = [("symmetric", 1), ("asymmetric", 1), ("log2", 1), ("log", 1), ("log", 4), ("mixed", 1)]


def skewed(timesteps: int = 9, width: int = 40, seed: int = 0) -> jax.Array:
    """Features as SiLU makes them: most numbers just below zero, few large ones; drifting with the timestep."""
    random = np.random.default_rng(seed)
    base = 1.5 * random.standard_t(4, width) - 1
    drift = np.linspace(-1, 1, timesteps)[:, None] * random.normal(0, 0.4, width)
    return jax.nn.silu(jnp.asarray(base + drift, jnp.float32))


def released(x, bits, largest):
    """Qlog of the release, number by number: the power of two nearest in the linear domain, from 1 down."""
    ratio = abs(x) / largest
    if ratio == 0:
        return 0.0
    exponent = np.floor(np.log2(ratio))
    exponent += ratio >= 1.5 * 2.0**exponent
    code = -exponent
    return 0.0 if code >= 2**bits else float(np.sign(x) * largest * 2.0 ** -np.clip(code, 0, 2**bits - 1))


def test_log2_is_the_released_quantizer():
    features = skewed()
    largest = float(jnp.abs(features).max())
    for bits in (3, 4, 6):
        found = to_levels(features, *FeatureGrid("log2", bits).fit(features))
        expected = np.vectorize(lambda x, bits=bits: released(x, bits, largest))(np.asarray(features, np.float64))
        # Below half of the smallest power the release gives zero from 3/4 of it on; this rounds to the nearer one.
        smallest = largest * 2.0 ** -(2**bits - 1)
        clear = np.abs(features) >= 0.76 * smallest
        np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-6)
        assert clear.mean() > 0.9 or bits == 3


@pytest.mark.parametrize("symmetric", [True, False])
def test_uniform_grids_are_those_of_every_layer(symmetric):
    features, grid = skewed(), Grid(5, symmetric)
    scale, zero = grid.from_range(features.min(), features.max())
    edges = [None if a is None else a.reshape(1, 1) for a in (scale, zero)]
    found = to_levels(features, *FeatureGrid("symmetric" if symmetric else "asymmetric", 5).fit(features))
    np.testing.assert_allclose(found, fake_quantize(features, grid, *edges), atol=1e-6)  # one float32 rounding of 4


@pytest.mark.parametrize(("kind", "steps"), KINDS)
@settings(deadline=None, max_examples=8)
@given(bits=st.integers(3, 8), seed=st.integers(0, 99))
def test_levels_ascend_and_are_as_many_as_the_bits_allow(kind, steps, bits, seed):
    features, grid = skewed(seed=seed), FeatureGrid(kind, bits, steps)
    levels, edges = grid.fit(features)
    assert levels.shape == (grid.count,)
    assert edges.shape == (grid.count - 1,)
    assert bool((jnp.diff(levels) >= 0).all())
    assert grid.count <= 2**grid.stored_bits + (kind == "log2")
    rounded = to_levels(features, levels, edges)
    nearest = jnp.abs(features[..., None] - levels).min(axis=-1)
    np.testing.assert_allclose(jnp.abs(features - rounded), nearest, atol=1e-6)
    # A level stays where it is, up to ties of levels that float32 cannot tell apart.
    np.testing.assert_allclose(to_levels(levels, levels, edges), levels, atol=1e-30)


def test_log_halves_in_as_many_steps_as_it_says():
    features = skewed()
    for steps in (1, 2, 4):
        levels, _ = FeatureGrid("log", 6, steps).fit(features)
        positive = np.asarray(levels[levels > 0], np.float64)
        np.testing.assert_allclose(positive[steps:] / positive[:-steps], 2, rtol=1e-5)
        assert len(positive) == 31
        assert positive[-1] == pytest.approx(float(jnp.abs(features).max()))


def test_mixed_is_never_worse_than_its_own_parts_at_the_ends():
    features = skewed()
    mixed = to_levels(features, *FeatureGrid("mixed", 6).fit(features))
    uniform = to_levels(features, *FeatureGrid("symmetric", 5).fit(features))
    assert float(jnp.square(mixed - features).mean()) < float(jnp.square(uniform - features).mean())


def test_measures_of_what_is_exact_and_of_what_is_lost():
    features = skewed()
    kept = discriminability(features, features)
    assert (kept.identity_rate, kept.collapse, kept.distance_ratio) == (1, 0, pytest.approx(1))
    assert kept.centred_sqnr_db == np.inf
    lost = discriminability(features, jnp.broadcast_to(features.mean(axis=0), features.shape))
    assert lost.identity_rate == pytest.approx(1 / len(features))
    assert lost.collapse == 1
    assert lost.distance_ratio == 0
    assert lost.centred_sqnr_db == pytest.approx(0, abs=1e-4)  # the error is the whole signal
    with pytest.raises(ValueError, match="two timesteps"):
        discriminability(features[:1], features[:1])


def test_collapse_counts_what_became_alike():
    features = jnp.array([[0.0, 1.0, 5.0], [0.4, 1.0, 6.0], [0.6, 3.0, 6.0]])
    # Differing neighbours: 0.0/0.4, 0.4/0.6, 1/3, 5/6. Rounded to whole numbers 0.0 and 0.4 become alike.
    assert discriminability(features, jnp.round(features)).collapse == pytest.approx(1 / 4)


def test_the_chosen_grid_tells_most_apart():
    features, weight = skewed(), jnp.asarray(np.random.default_rng(1).normal(size=(7, 40)), jnp.float32)
    for bits in (4, 8):
        choose = ChooseGrid.among_all(bits)
        rounded = {grid: to_levels(features, *grid.fit(features)) for grid in choose.candidates}
        apart = {grid: discriminability(features, rows) for grid, rows in rounded.items()}
        best = max((one.identity_rate, -one.collapse) for one in apart.values())
        found = apart[choose.choose(features, weight)]
        assert (found.identity_rate, -found.collapse) == best
        behind = {g: discriminability(features @ weight.T, rows @ weight.T) for g, rows in rounded.items()}
        most = ChooseGrid.among_all(bits, "signal").choose(features, weight)
        assert behind[most].centred_sqnr_db == max(one.centred_sqnr_db for one in behind.values())


def test_grids_that_make_no_sense():
    with pytest.raises(ValueError, match="collapse or signal"):
        ChooseGrid.among_all(8, "distance")
    for arguments in [("log3", 8), ("log2", 1), ("mixed", 2), ("log2", 8, 4), ("log", 8, 0)]:
        with pytest.raises(ValueError):
            FeatureGrid(*arguments)
