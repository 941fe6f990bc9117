"""Tokenizers of published folders: numbers as transformers has them, lengths, missing and damaged files."""

import sys

import numpy as np
import pytest
from published_folders import (
    PIECES,
    clip_tokenizer,
    fast_tokenizer,
    sentencepiece_bytes,
    t5_tokenizer,
)

from models.sentencepiece import read_sentencepiece
from models.tokenizer import TextTokenizer
from qvdjax.errors import UserError

TEXTS = (
    "a red cat", "", "  a   cat\n disc ", "A Red CAT!", "cats </s> cat", "zebra", "a cat" * 9, "<pad> cat",
    "cat<|endoftext|>disc", "ﬁ e\u0301 ▁a",
)  # fmt: skip


def compare(ours: TextTokenizer, theirs, length: int):
    tokens = ours.encode(TEXTS, length)
    found = theirs(list(TEXTS), padding="max_length", max_length=length, truncation=True, return_tensors="np")
    np.testing.assert_array_equal(tokens.numbers, found["input_ids"])
    whole = [len(theirs(text)["input_ids"]) for text in TEXTS]
    assert tokens.cut == tuple(max(0, count - length) for count in whole)
    assert any(tokens.cut)
    np.testing.assert_array_equal(tokens.mask.sum(axis=1), [min(count, length) for count in whole])


def test_sentencepiece_as_transformers_has_it(tmp_path):
    from transformers import T5Tokenizer

    theirs = T5Tokenizer(vocab=[(text, score) for text, score, _ in PIECES], extra_ids=0)
    compare(TextTokenizer(t5_tokenizer(tmp_path / "t5")), theirs, 12)


def test_gaps_follow_the_files_pieces(tmp_path):
    folder = t5_tokenizer(tmp_path / "t5")
    (folder / "tokenizer_config.json").unlink()
    found = TextTokenizer(folder).encode(["a <extra_id_0> cat"], 6).numbers[0].tolist()
    assert found == [3, len(PIECES) + 99, 4, 1, 0, 0]


@pytest.mark.parametrize("padding", ["<|endoftext|>", "!"])
def test_merges_as_transformers_has_them(tmp_path, padding):
    from transformers import CLIPTokenizer

    folder = clip_tokenizer(tmp_path / "clip", padding)
    compare(TextTokenizer(folder), CLIPTokenizer.from_pretrained(folder), 9)


def test_the_files_of_newer_folders_say_the_same(tmp_path):
    old = t5_tokenizer(tmp_path / "t5")
    new = fast_tokenizer(old, tmp_path / "new")
    one, other = (TextTokenizer(folder).encode(TEXTS, 12) for folder in (old, new))
    np.testing.assert_array_equal(one.numbers, other.numbers)
    assert one.cut == other.cut


def test_the_end_of_a_text_stays_when_it_is_cut(tmp_path):
    tokens = TextTokenizer(t5_tokenizer(tmp_path / "t5")).encode(["a red cat", "a cat"], 3)
    assert tokens.numbers.tolist() == [[3, 5, 1], [3, 4, 1]]
    assert tokens.cut == (1, 0)
    assert tokens.mask.all()


def test_a_sentencepiece_file_is_read(tmp_path):
    (tmp_path / "spiece.model").write_bytes(sentencepiece_bytes(character_map=b"\x00\x01"))
    model = read_sentencepiece(tmp_path / "spiece.model")
    assert [(piece.text, piece.kind) for piece in model.pieces] == [(text, kind) for text, _, kind in PIECES]
    # Scores are float32 in the file.
    np.testing.assert_allclose([piece.score for piece in model.pieces], [score for _, score, _ in PIECES], rtol=1e-7)
    assert model.character_map == b"\x00\x01"


@pytest.mark.parametrize(("content", "message"), [
    (sentencepiece_bytes()[:-3], "is no SentencePiece model"),
    (sentencepiece_bytes()[:40], "is no SentencePiece model"),
    (b"\xff" * 30, "is no SentencePiece model"),
    (b"", "no unigram model"),
    (sentencepiece_bytes(kind=2), "no unigram model; give the tokenizer as tokenizer.json"),
    (sentencepiece_bytes(pieces=PIECES[2:]), "lacks the tokens of T5"),
    (sentencepiece_bytes(pieces=PIECES[:2]), "lacks the tokens of T5"),
    (sentencepiece_bytes(character_map=b"\x07"), "cannot be read"),
])  # fmt: skip
def test_damaged_sentencepiece_files_are_said(tmp_path, content, message):
    folder = t5_tokenizer(tmp_path / "t5")
    (folder / "spiece.model").write_bytes(content)
    with pytest.raises(UserError, match=message):
        TextTokenizer(folder)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", "{", "cannot be read .*; download it again"),
    ("tokenizer.json", "{}", "cannot be read"),
    ("vocab.json", '{"a": 0}', "cannot be read|lacks"),
    ("merges.txt", "#version: 0.2\na b c\n", "cannot be read"),
    ("tokenizer_config.json", '{"pad_token": "<nothing>"}', "no token '<nothing>' to fill"),
])  # fmt: skip
def test_damaged_files_are_said(tmp_path, name, content, message):
    folder = clip_tokenizer(tmp_path / "clip")
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=message):
        TextTokenizer(folder)


def test_missing_files_are_said(tmp_path):
    folder = clip_tokenizer(tmp_path / "clip")
    (folder / "merges.txt").unlink()
    with pytest.raises(UserError, match="holds no tokenizer; download tokenizer.json, or spiece.model, or vocab.json"):
        TextTokenizer(folder)
    with pytest.raises(UserError, match="does not exist"):
        TextTokenizer(tmp_path / "nowhere")


def test_a_missing_package_is_said(tmp_path, monkeypatch):
    folder = clip_tokenizer(tmp_path / "clip")
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # what makes an import fail
    with pytest.raises(UserError, match=r"not installed; pip install tokenizers"):
        TextTokenizer(folder)
