"""The schedule of rank decay: exact boundaries, gates worked out in NumPy, recipes that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.qat.rank_decay import RankDecay


@pytest.mark.parametrize(
    ("steps", "boundaries"),
    # The released training scripts: phases of 333 and 444 steps.
    [(2000, (0, 333, 666, 999, 1332, 1665, 1998)), (2667, (0, 444, 888, 1332, 1776, 2220, 2664))],
)
def test_the_releases_boundaries(steps, boundaries):
    decay = RankDecay(steps, phases="code")
    assert decay.ranks == (32, 16, 8, 4, 2, 1)
    assert decay.boundaries() == boundaries


def test_the_papers_boundaries():
    decay = RankDecay(2000)
    assert decay.ranks == (32, 16, 8, 4, 2)
    assert decay.boundaries() == (0, 400, 800, 1200, 1600, 2000)


@pytest.mark.parametrize(
    ("phases", "keep", "ranks"),
    [
        ("paper", 0.75, (32, 24, 18, 13, 9, 6, 4)),  # on while r / 4 > 1
        ("paper", 0.25, (32, 8, 2)),
        ("paper", 2 / 3, (32, 21, 14, 9, 6, 4, 2)),
        ("paper", 0.0, (32,)),
        ("code", 0.25, (32, 8, 2)),
        ("code", 0.75, (32, 24, 18, 13, 9, 6, 4, 3, 2, 1)),
        ("single", 0.5, (32,)),
    ],
)
def test_ranks_of_other_parts(phases, keep, ranks):
    assert RankDecay(2000, phases=phases, keep=keep).ranks == ranks


def gates(decay, steps):
    return np.asarray(jax.jit(jax.vmap(decay.gamma))(jnp.asarray(steps, jnp.int32)))


def released(step, length, rank=32):
    """The release's rule, written as it is there: one call a step that may halve the rank, then u."""
    alive = rank
    for now in range(1, step + 1):
        if now % length == 0:
            alive = alive // 2
    gamma = np.zeros(rank)
    gamma[:alive] = (1 + np.cos(np.pi * (step % length) / length)) / 2
    if alive >= 2:
        gamma[: alive // 2] = 1
    return gamma


def test_gates_are_the_releases():
    decay = RankDecay(65, phases="code")  # phases of 10 steps, 5 steps left over
    steps = range(70)
    # u is a cosine in float32: an error of 1e-7, doubled by the sum.
    np.testing.assert_allclose(gates(decay, steps), [released(step, 10) for step in steps], atol=3e-7)


def test_the_last_phase_of_the_paper_fades_all_that_is_left():
    decay = RankDecay(50)  # phases of 10 steps
    half = gates(decay, [45])[0]
    np.testing.assert_allclose(half, [0.5] * 2 + [0] * 30, atol=3e-7)
    assert not gates(decay, [50, 51, 1000]).any()


@pytest.mark.parametrize(("shape", "u"), [("linear", 0.75), ("quadratic", 0.5625), ("cubic", 0.421875)])
def test_other_shapes(shape, u):
    # a quarter through the first phase
    gamma = gates(RankDecay(40, rank=2, shape=shape, phases="single"), [10])[0]
    np.testing.assert_array_equal(gamma, np.float32([u, u]))  # powers of 3/4, exact in float32


@pytest.mark.parametrize("shape", ["cosine", "linear", "quadratic", "cubic"])
@pytest.mark.parametrize("phases", ["paper", "code", "single"])
def test_gates_close_and_never_open_again(shape, phases):
    decay = RankDecay(103, rank=9, phases=phases, shape=shape, warm_up=11)
    table = gates(decay, range(110))
    assert table.dtype == np.float32
    assert (np.diff(table, axis=0) <= 0).all()  # in time
    assert (np.diff(table, axis=1) <= 0).all()  # the stronger direction is never the more closed
    assert (table[:12] == 1).all()
    assert not table[decay.boundaries()[-1] :].any()
    assert table[decay.boundaries()[-1] - 1, 0] > 0


def test_never_fading():
    decay = RankDecay(10, phases="keep")
    assert (gates(decay, range(12)) == 1).all()
    assert decay.boundaries() == ()
    assert not any(bool(decay.starts_phase(step)) for step in range(12))
    assert int(decay.active_rank(9)) == 32


@pytest.mark.parametrize("warm_up", [0, 7])
def test_starts_of_phases(warm_up):
    decay = RankDecay(60 + warm_up, phases="code", warm_up=warm_up)
    starts = jax.jit(jax.vmap(decay.starts_phase))(jnp.arange(80))
    expected = [step + warm_up for step in (10, 20, 30, 40, 50, 60)]
    # Factors that a warm-up has moved are ordered anew; those that are as they began need not be.
    assert np.flatnonzero(starts).tolist() == ([warm_up] if warm_up else []) + expected


def test_phases_and_ranks_by_step():
    decay = RankDecay(60, phases="code")
    assert [int(decay.phase(step)) for step in (0, 9, 10, 59, 60, 500)] == [0, 0, 1, 5, 6, 6]
    assert [int(decay.active_rank(step)) for step in (0, 9, 10, 59, 60, 500)] == [32, 32, 16, 1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 11, "phases": "code"}, "6 phases of rank decay do not fit 11 steps"),
        ({"total_steps": 40, "warm_up": 31}, "5 phases of rank decay do not fit 40 steps after 31 of warm-up"),
        ({"total_steps": 100, "rank": 0}, "0 directions"),
        ({"total_steps": 100, "keep": 1.0}, "keeps 1.0"),
        ({"total_steps": 100, "warm_up": -1}, "-1 steps"),
        ({"total_steps": 100, "phases": "papers"}, "no phases 'papers'"),
        ({"total_steps": 100, "shape": "step"}, "no shape 'step'"),
    ],
)
def test_recipes_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        RankDecay(**options)


def test_the_remedy_suffices():
    with pytest.raises(UserError, match="at least 14 steps"):
        RankDecay(13, phases="code", warm_up=2)
    assert RankDecay(14, phases="code", warm_up=2).boundaries() == (2, 4, 6, 8, 10, 12, 14)
