import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qvdjax.metrics import bootstrap_interval, paired_difference, relative_difference

finite_values = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=12)


@given(finite_values)
def test_interval_holds_its_mean_and_stays_inside_the_values(values):
    interval = bootstrap_interval(values, resamples=500)
    # Means of equal values may leave them by the last bit.
    slack = 1e-9 * max(1.0, max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.mean <= interval.high <= max(values) + slack


@given(finite_values)
def test_same_seed_same_interval(values):
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)


@given(finite_values, st.floats(-1e3, 1e3), st.floats(0.01, 100))
def test_interval_moves_and_scales_with_the_values(values, shift, scale):
    values = np.array(values)
    plain = bootstrap_interval(values, resamples=200)
    moved = bootstrap_interval(scale * values + shift, resamples=200)
    expected = [scale * x + shift for x in (plain.mean, plain.low, plain.high)]
    # Float64 rounding of sums of at most 12 values of at most 1e8.
    np.testing.assert_allclose([moved.mean, moved.low, moved.high], expected, rtol=1e-9, atol=1e-6)


def test_one_value_has_no_width():
    interval = bootstrap_interval([2.5])
    assert (interval.mean, interval.low, interval.high) == (2.5, 2.5, 2.5)


@pytest.mark.parametrize(("count", "at_least"), [(8, 0.84), (40, 0.90)])
def test_coverage_of_the_true_mean(count, at_least):
    """A nominal 95 % interval covers the true mean somewhat less often, the more so the fewer the values.

    Its half width is about 1.96 s sqrt((n - 1) / n) / sqrt(n): theory (t distribution) gives 0.89 at 8,
    0.94 at 40. Over 400 trials three standard deviations of the frequency are 0.047 and 0.036.
    """
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(400):
        interval = bootstrap_interval(rng.normal(1.0, 1.0, count), resamples=400, seed=trial)
        covered += interval.low <= 1.0 <= interval.high
    assert at_least <= covered / 400 < 0.99


def test_more_values_narrow_the_interval():
    values = np.random.default_rng(0).standard_normal(400)
    widths = [(i.high - i.low) for i in (bootstrap_interval(values[:n]) for n in (16, 100, 400))]
    # Width falls with the square root of the count: factors 2.5 and 2; half of that is asked for.
    assert widths[0] > 1.25 * widths[1] > 1.25 * widths[2]


def test_pairing_finds_what_separate_intervals_hide():
    """Prompts differ by 1, candidates by 0.1: separate intervals overlap, the paired one excludes zero."""
    rng = np.random.default_rng(0)
    prompts = rng.normal(0, 1, 30)
    worse, better = prompts + 0.1 + rng.normal(0, 0.02, 30), prompts
    separate = bootstrap_interval(worse), bootstrap_interval(better)
    assert separate[0].low < separate[1].high
    difference = paired_difference(worse, better)
    assert difference.excludes_zero
    # The standard error of the mean difference is 0.02 / sqrt(30) = 0.004; five of them.
    assert abs(difference.mean - 0.1) < 0.02
    assert paired_difference(better, worse).mean == pytest.approx(-difference.mean, rel=1e-12)


def test_equal_candidates_do_not_differ():
    assert not paired_difference([1.0, 2.0], [1.0, 2.0]).excludes_zero


@pytest.mark.parametrize(
    ("values", "message"), [([], "at least one"), ([[1.0]], "one axis"), ([1.0, np.nan], "finite")]
)
def test_values_must_be_a_finite_list(values, message):
    with pytest.raises(ValueError, match=message):
        bootstrap_interval(values)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -1])
def test_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_interval([1.0], confidence=confidence)


def test_pairs_need_equal_lengths():
    with pytest.raises(ValueError, match="equal shapes"):
        paired_difference([1.0], [1.0, 2.0])


@given(st.lists(st.tuples(st.floats(0, 1e3), st.floats(0.01, 1e3)), min_size=1, max_size=12))
def test_relative_differences_stay_above_minus_one_and_know_equals(pairs):
    first, second = zip(*pairs)
    found = relative_difference(first, second)
    # Sums of up to 12 numbers, rounded in double precision.
    assert found.low >= -1 - 1e-12
    assert found.low <= found.mean <= found.high
    assert found.mean == pytest.approx(np.sum(first) / np.sum(second) - 1, abs=1e-9, rel=1e-9)
    twice = relative_difference(2 * np.asarray(second), second)
    # A ratio that all prompts share has no spread, whatever is drawn.
    np.testing.assert_allclose([twice.low, twice.mean, twice.high], 1, rtol=1e-12)


def test_a_ratio_to_nothing_is_refused():
    with pytest.raises(ValueError, match="above zero"):
        relative_difference([1.0, 2.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="equal shapes"):
        relative_difference([1.0], [1.0, 2.0])
