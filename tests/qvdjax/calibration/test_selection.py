"""Salient data selection: the scores by hand, every way to choose, what is asked for in vain."""

import numpy as np
import pytest

from qvdjax.calibration import Trajectory, collect
from qvdjax.calibration.selection import Selection, candidates, scored, select
from qvdjax.errors import UserError

PROMPTS, STEPS = 3, 6
SAMPLES = [{"prompt": f"prompt {number}", "seed": number} for number in range(PROMPTS)]


def trajectory(number: int) -> Trajectory:
    """Latents whose scale and changes differ by step."""
    random = np.random.default_rng(number)
    draw = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    latents = draw(STEPS, 2, 4, 6, 3) * (1 + np.arange(STEPS, dtype=np.float32))[:, None, None, None, None]
    return Trajectory(latents, np.linspace(999, 200, STEPS, dtype=np.float32), draw(7, 8), draw(7, 8))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return collect(tmp_path_factory.mktemp("set") / "c", {"model": "tiny"}, SAMPLES, trajectory)


def test_scores_are_those_of_the_equations(calibration):
    latents = trajectory(1).latents.astype(np.float64)
    tokens = latents.reshape(STEPS, -1, 3)
    own = [one for one in candidates(calibration) if one.sample == 1]
    spectral = [one for one in candidates(calibration, "spectral") if one.sample == 1]
    assert [one.step for one in own] == list(range(STEPS - 1))  # the last has no neighbour
    for one, other in zip(own, spectral):
        x, after = latents[one.step], latents[one.step + 1]
        assert one.difference == pytest.approx(((x - after) ** 2).sum() / (x**2).sum(), rel=1e-5)
        hessian = tokens[one.step].T @ tokens[one.step]
        assert one.quantization == pytest.approx(np.linalg.norm(hessian), rel=1e-5)
        # Thirty steps of power iteration, eigenvalues of random data near each other.
        assert other.quantization == pytest.approx(np.linalg.norm(hessian, 2), rel=1e-2)


def test_scores_are_brought_to_unit_range_over_the_whole_pool(calibration):
    pool = scored(candidates(calibration), "product")
    difference, quantization = (
        np.array([getattr(one, name) for one in pool]) for name in ("difference", "quantization")
    )
    unit = lambda a: (a - a.min()) / (a.max() - a.min())  # noqa: E731
    np.testing.assert_allclose([one.score for one in pool], unit(difference) * unit(quantization), rtol=1e-6)


@pytest.mark.parametrize("by", ["product", "difference", "quantization"])
def test_the_highest_scores_are_taken(calibration, by):
    selected = select(calibration, Selection(4, by))
    ranked = sorted(selected.pool, key=lambda one: -one.score)
    assert set(selected.chosen) == set(ranked[:4])


def test_choices_without_scores(calibration):
    places = lambda **how: [(one.sample, one.step) for one in select(calibration, Selection(7, **how)).chosen]  # noqa: E731
    assert places(by="random") == places(by="random") != places(by="random", seed=1)
    assert len(set(places(by="random"))) == 7
    # All five candidates of one prompt, and two of another.
    counts = np.bincount([sample for sample, _ in places(by="prompts")], minlength=PROMPTS)
    assert sorted(counts.tolist()) == [0, 2, 5]


def test_diverse_samples_share_prompts_and_are_no_neighbours(calibration):
    chosen = select(calibration, Selection(6, "diverse")).chosen
    steps = {number: [one.step for one in chosen if one.sample == number] for number in range(PROMPTS)}
    assert [len(own) for own in steps.values()] == [2, 2, 2]
    assert all(abs(a - b) > 1 for a, b in steps.values())
    assert len(select(calibration, Selection(15, "diverse")).chosen) == 15  # all there are, neighbours or not


def test_inputs_are_those_of_both_branches(calibration):
    selected = select(calibration, Selection(5))
    batches = list(selected)
    assert len(batches) == len(selected) == 10
    found = {(float(batch["timestep"][0]), batch["context"].tobytes()) for batch in batches}
    wanted = set()
    for one in selected.chosen:
        sample = calibration.trajectory(one.sample)
        for context in (sample.context, sample.negative_context):
            wanted.add((float(sample.timestep[one.step]), context.tobytes()))
    assert found == wanted
    table = selected.table()
    assert len(table) == PROMPTS * (STEPS - 1)
    assert sum(row["chosen"] for row in table) == 5


def test_sets_of_one_step_have_no_candidates(tmp_path):
    def one_step(number):
        sample = trajectory(number)
        return Trajectory(sample.latents[:1], sample.timestep[:1], sample.context, sample.negative_context)

    with pytest.raises(UserError, match="1 samples are to be selected from 0 candidates"):
        select(collect(tmp_path / "set", {}, SAMPLES, one_step), Selection(1))


def test_more_than_there_are_and_unknown_ways_are_refused(calibration):
    with pytest.raises(UserError, match="16 samples .* 15 candidates; select fewer"):
        select(calibration, Selection(16))
    with pytest.raises(ValueError, match="by is one of product"):
        Selection(by="luck")
    with pytest.raises(ValueError, match="at least one"):
        Selection(0)
