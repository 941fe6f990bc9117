"""The oracle: right on clean and noisy clips, hard to fool, and never at a loss."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments.moving_shapes.captions import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Caption,
    prompts,
)
from experiments.moving_shapes.clips import clip
from experiments.moving_shapes.oracle import measure, score

NAMES = {
    "color": COLORS,
    "shape": SHAPES,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
    "background": BACKGROUNDS,
}


@pytest.fixture(scope="module")
def clips():
    """288 captions, three for each colour, shape and direction, with a clip of each."""
    captions = [Caption.parse(text) for text in prompts(288, seed=5)]
    return [(caption, np.asarray(clip(caption, seed=5, index=i))) for i, caption in enumerate(captions)]


def means(clips):
    rows = [score(video, caption) for caption, video in clips]
    return {name: np.mean([row[name] for row in rows if row[name] is not None]) for name in rows[0]}


def test_clean_clips_score_full(clips):
    result = means(clips)
    for name in NAMES:
        assert result[name] >= 0.99, (name, result)
    # Nothing but motion changes; a thin shape's inner pixels are partly edge, so its median colour moves.
    assert result["flicker"] < 1e-3


def test_noise_of_a_tenth_does_not_matter(clips):
    noise = np.random.default_rng(0)
    noisy = [(c, (v + noise.normal(0, 0.1, v.shape)).astype(np.float32)) for c, v in clips]
    result = means(noisy)
    for name in NAMES:
        assert result[name] >= 0.97, (name, result)
    # Two draws of noise differ by 0.1 x 2 / sqrt(pi) = 0.113 in the mean before clipping, which on
    # black and white takes away half of each draw.
    assert 0.05 < result["flicker"] < 0.12


@pytest.mark.parametrize("field", NAMES)
def test_wrong_captions_score_zero(clips, field):
    choice = np.random.default_rng(1)
    for caption, video in clips[::3]:
        if getattr(caption, field) is None:
            continue
        others = [name for name in NAMES[field] if name != getattr(caption, field)]
        wrong = dataclasses.replace(caption, **{field: str(choice.choice(others))})
        result = score(video, wrong)
        assert result.pop(field) == 0.0
        assert all(value in (1.0, None) for name, value in result.items() if name != "flicker")


def test_what_a_caption_leaves_open_is_not_scored(clips):
    caption, video = clips[0]
    result = score(video, Caption(caption.color, caption.shape, caption.direction))
    assert result["speed"] is None
    assert result["background"] is None


OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def test_backwards_turns_the_direction_and_nothing_else(clips):
    for _, video in clips[::5]:
        forward, backward = measure(video), measure(video[::-1])
        assert backward.direction == OPPOSITE[forward.direction]
        assert backward.velocity == pytest.approx([-v for v in forward.velocity], abs=1e-6)  # the same slopes
        for name in ("color", "shape", "speed", "background"):
            assert getattr(backward, name) == getattr(forward, name)


def test_a_mirror_swaps_left_and_right(clips):
    for caption, video in clips[::5]:
        mirrored = measure(video[:, :, ::-1])
        sideways = caption.direction in ("left", "right")
        assert mirrored.direction == (OPPOSITE[caption.direction] if sideways else caption.direction)
        assert (mirrored.color, mirrored.shape) == (caption.color, caption.shape)  # all four are symmetric


def test_a_quarter_turn_turns_the_direction(clips):
    turned = {"left": "down", "down": "right", "right": "up", "up": "left"}  # counter-clockwise
    for caption, video in clips[::5]:
        seen = measure(np.rot90(video, axes=(1, 2)))
        assert seen.direction == turned[caption.direction]
        if caption.shape != "triangle":  # a triangle on its side is none of the references
            assert seen.shape == caption.shape


def test_a_frozen_clip_moves_nowhere(clips):
    for caption, video in clips[::20]:
        seen = measure(np.repeat(video[:1], 9, axis=0))
        assert (seen.color, seen.shape) == (caption.color, caption.shape)
        assert (seen.direction, seen.speed) == (None, None)


def test_flicker_counts_changes_that_are_not_motion(clips):
    sign = np.where(np.arange(9) % 2, 1, -1)[:, None, None, None]
    for _, video in clips[::20]:
        if measure(video).background != "grey":  # elsewhere a change is clipped
            continue
        seen = [measure(video + a * sign).flicker for a in (0.0, 0.02, 0.05)]
        # Every background pixel changes by 2 a; the shape, a tenth of all, by less where that is clipped.
        assert seen[1] == pytest.approx(0.04, rel=0.1)
        assert seen[2] == pytest.approx(0.10, rel=0.1)
        only_shape = np.where(np.abs(video - video[:, :1, :1]).max(-1, keepdims=True) > 0.3, 0.05 * sign, 0)
        assert seen[0] < measure(video + only_shape).flicker < seen[1]


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((9, 32, 32, 3)),
        np.full((9, 32, 32, 3), 0.5),
        np.random.default_rng(0).random((9, 32, 32, 3)),
        np.random.default_rng(0).normal(size=(9, 32, 32, 3)),
        np.full((9, 32, 32, 3), np.nan),
        np.full((9, 32, 32, 3), 1e30),
        np.zeros((1, 4, 4, 3)),
        np.zeros((0, 32, 32, 3)),
        np.zeros((9, 32, 32)),
    ],
    ids=["black", "grey", "uniform", "normal", "nan", "huge", "tiny", "no-frames", "no-colour-axis"],
)
def test_where_nothing_is_there_nothing_is_scored(video):
    result = score(video, Caption("red", "disc", "left"))
    assert (result["color"], result["shape"], result["direction"]) == (0.0, 0.0, 0.0)


def test_one_frame_that_is_not_finite_shows_nothing(clips):
    caption, video = clips[0]
    broken = video.copy()
    broken[4, 3, 3, 1] = np.inf
    assert measure(broken).color is None


@given(
    hnp.arrays(
        np.float32,
        st.tuples(st.integers(1, 10), st.integers(1, 40), st.integers(1, 40), st.just(3)),
        elements=st.floats(-10, 10, width=32),
        fill=st.floats(0, 1, width=32),
    )
)
def test_any_finite_clip_is_measured(video):
    seen = measure(video)
    assert 0 <= seen.flicker <= 1
    assert -1.001 <= seen.likeness <= 1.001  # a correlation, rounded
