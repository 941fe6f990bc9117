import statistics

import jax.numpy as jnp
import pytest

from experiments.bench import timing
from experiments.bench.timing import Timed, measure


def test_a_timed_function_keeps_its_output_and_its_compile_time():
    timed = Timed(lambda tree, y: tree["x"] * y, {"x": jnp.arange(3.0)}, jnp.float32(2))
    assert timed.output.tolist() == [0, 2, 4]
    assert timed.compile_seconds > 0


class Recorded:
    """Stands in for a compiled function: every sample takes the next of the given times."""

    def __init__(self, name, times, log):
        self.name, self.times, self.log = name, list(times), log

    def sample(self, calls):
        self.log.append((self.name, calls))
        return self.times.pop(0)


def test_samples_alternate_and_each_round_starts_with_another_function():
    log = []
    two = [Recorded("a", [0.1] * 5, log), Recorded("b", [0.1] * 5, log)]
    measure(two, rounds=3)
    assert [name for name, _ in log[4:]] == ["a", "b", "b", "a", "a", "b"]  # after two warm samples each


def test_medians_and_spreads_are_over_the_rounds():
    times = [0.030, 0.010, 0.020, 0.050, 0.040]
    got = measure([Recorded("a", [1, 0.5, *times], [])], rounds=5)[0]
    assert got.median_ms == pytest.approx(30)
    first, _, third = statistics.quantiles(times, n=4, method="inclusive")
    assert got.spread_ms == pytest.approx(1e3 * (third - first))
    assert got.rounds == 5


def test_short_functions_repeat_within_a_sample_and_long_ones_take_fewer_rounds():
    log = []
    measure([Recorded("short", [1e-3, 1e-3] + [1e-3] * 5, log)], rounds=5)
    assert log[-1] == ("short", round(timing.MINIMUM_SECONDS / 1e-3))
    log.clear()
    got = measure([Recorded("long", [2.0] * 9, log)], rounds=7)[0]
    assert got.rounds == timing.LONG_ROUNDS
    assert {calls for _, calls in log} == {1}
