"""Steps drawn from a normal distribution: their law, their share of each sample, and what a recipe makes of them."""

import numpy as np
import pytest
from small_models import wan

import qvdjax
from qvdjax.calibration import Trajectory, collect, input_ranges
from qvdjax.calibration.timestep_draw import TimestepDraw, draw
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, layers_of
from qvdjax.recipes import get

STEPS = 5


def trajectory(number: int) -> Trajectory:
    """Latents that grow towards the finished video."""
    random = np.random.default_rng(number)
    draws = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    latents = draws(STEPS, 1, 4, 6, 5) * (1 + np.arange(STEPS, dtype=np.float32))[:, None, None, None, None]
    return Trajectory(latents, np.linspace(999, 200, STEPS, dtype=np.float32), draws(7, 24), draws(7, 24))


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    samples = [{"prompt": f"prompt {number}", "seed": number} for number in range(3)]
    return collect(tmp_path_factory.mktemp("set") / "c", {"model": "tiny"}, samples, trajectory)


def test_steps_follow_the_distribution():
    places = TimestepDraw(20_000).places((1000,))
    before_end = 999 - np.array([step for _, step in places])
    # Clipping at 0 and T - 1 takes the 16 % below and the 6.7 % above: whole numbers of draws, within 3 deviations of
    # a binomial (0.8 and 0.5 %). Between, the median stays 0.4 T; its error is 1.25 x 400 / sqrt(20000) = 3.5.
    assert (before_end == 0).mean() == pytest.approx(0.1587, abs=8e-3)
    assert (before_end == 999).mean() == pytest.approx(0.0668, abs=6e-3)
    assert np.median(before_end) == pytest.approx(400, abs=11)


def test_samples_take_turns():
    places = TimestepDraw(8, seed=3).places((5, 7, 5))
    assert places == sorted(places) == TimestepDraw(8, seed=3).places((5, 7, 5))
    assert sorted(np.bincount([sample for sample, _ in places])) == [2, 3, 3]
    assert all(0 <= step < (5, 7, 5)[sample] for sample, step in places)
    assert places != TimestepDraw(8, seed=4).places((5, 7, 5))


def test_inputs_are_those_of_the_drawn_places(calibration):
    drawn = draw(calibration, TimestepDraw(30))
    for _ in range(2):  # read anew each time
        batches = list(drawn)
        assert sum(len(batch["timestep"]) for batch in batches) == 60
        latents = np.concatenate([batch["latents"] for batch in batches if len(batch["latents"])])
    wanted = []
    for number in range(3):
        own = [trajectory(number).latents[step] for sample, step in drawn.places if sample == number]
        assert len(own) == 10
        wanted += own * 2  # with the prompt, then with the negative prompt
    np.testing.assert_array_equal(latents, wanted)


def test_the_recipe_calibrates_on_what_is_drawn(calibration):
    """All draws at the last step: ranges are those of mse there."""
    others = r"condition_embedder\.time_proj|blocks\..*(to_.*|ffn\.net\.2)"
    model = wan(num_layers=1)
    at_end = {"step_mean": 0.0, "step_deviation": 0.0, "samples": 3, "skip": others}
    drawn = qvdjax.quantize(model, get("ptq4dm-w8a8", **at_end), calibration)
    ends = [batch for number in range(3) for batch in calibration.trajectory(number).inputs([STEPS - 1])]
    by_hand = qvdjax.quantize(model, get("mse-w8a8", skip=others), ends)
    scales = [
        {names[0]: np.asarray(layer.input_scale[...]) for names, _, layer in layers_of(one, QUANTIZED_LAYERS)}
        for one in (drawn, by_hand)
    ]  # fmt: skip
    assert scales[0]
    assert scales[0] == scales[1]
    low, high = input_ranges(model, ends)[next(iter(scales[0]))]
    assert scales[0].popitem()[1].item() <= max(-low.min(), high.max()) / 127 * (1 + 1e-6)  # means of narrower ranges


@pytest.mark.parametrize("option", [{"samples": 0}, {"step_deviation": -0.1}])
def test_draws_that_make_no_sense(option):
    with pytest.raises(UserError, match=r"drawn|sense"):
        get("ptq4dm-w8a8", **option)
