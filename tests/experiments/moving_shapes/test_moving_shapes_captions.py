"""The grammar: every sentence can be listed, read and written; prompt lists are balanced."""

import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.moving_shapes.captions import (
    COLORS,
    DIRECTIONS,
    SHAPES,
    TOKENS,
    WORDS,
    Caption,
    all_captions,
    prompts,
)
from qvdjax.errors import UserError


def test_every_caption_is_read_back():
    captions = all_captions()
    assert len(set(captions)) == 6 * 4 * 4 * 3 * 4
    for caption in captions:
        assert Caption.parse(str(caption)) == caption
        words = str(caption).split()
        assert len(words) <= TOKENS
        assert set(words) <= set(WORDS)


def test_words_are_few_and_different():
    assert len(WORDS) == len(set(WORDS)) <= 24


def test_case_and_spaces_do_not_matter():
    assert Caption.parse("  A red  Disc moving LEFT on grey ") == Caption("red", "disc", "left", None, "grey")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "grammar"),
        ("a red disc", "grammar"),
        ("the red disc moving left", "grammar"),
        ("a red disc going left", "grammar"),
        ("a purple disc moving left", "purple"),
        ("a red cube moving left", "cube"),
        ("a red disc moving sideways", "sideways"),
        ("a red disc moving left on mars", "mars"),
        ("a red disc moving left on", "'on'"),
        ("a red disc moving left on grey slowly", "on grey slowly"),
        ("a red disc moving left slowly slowly", "slowly"),
    ],
)
def test_other_sentences_are_refused_by_name(text, named):
    with pytest.raises(UserError, match=named):
        Caption.parse(text)


@given(st.lists(st.sampled_from(WORDS), max_size=9))
def test_any_order_of_words_is_a_caption_or_refused(words):
    try:
        caption = Caption.parse(" ".join(words))
    except UserError:
        return
    assert str(caption) == " ".join(words)


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_prompts_are_balanced(seed):
    captions = [Caption.parse(text) for text in prompts(1152, seed)]
    assert len(set(captions)) == 1152
    for start in range(0, 1152, 24):
        run = captions[start : start + 24]
        assert len({(c.color, c.shape) for c in run}) == len(COLORS) * len(SHAPES)
    for start in range(0, 1152, 96):
        run = captions[start : start + 96]
        assert len({(c.color, c.shape, c.direction) for c in run}) == 96
    counts = collections.Counter((c.speed, c.background) for c in captions)
    assert set(counts.values()) == {96}
    assert collections.Counter(c.direction for c in captions[:96]) == dict.fromkeys(DIRECTIONS, 24)


def test_prompts_depend_on_the_seed_alone():
    assert prompts(40, 3) == prompts(40, 3) == prompts(400, 3)[:40]
    assert prompts(40, 3) != prompts(40, 4)


def test_more_prompts_than_captions_begin_again():
    assert len(prompts(1200)) == 1200
