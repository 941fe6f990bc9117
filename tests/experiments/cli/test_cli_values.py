"""Seeds, meshes, prompts and overrides as they are typed."""

import contextlib

import hypothesis
import pytest
from hypothesis import strategies

from experiments.cli import values
from qvdjax.errors import UserError


@pytest.mark.parametrize(
    ("text", "seeds"), [("7", [7]), ("1,2,5", [1, 2, 5]), ("0-3", [0, 1, 2, 3]), ("9, 0-1", [9, 0, 1])]
)
def test_seeds(text, seeds):
    assert values.seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "1,,2", "1.5", "1,1", "0-2,1", "0-99999999", "2147483648"])
def test_what_is_no_list_of_seeds(text):
    with pytest.raises(UserError, match="--seeds"):
        values.seeds(text)


def test_mesh():
    assert values.mesh("data=2,fsdp=4") == {"data": 2, "fsdp": 4}
    assert values.mesh(None) is None
    with pytest.raises(UserError, match="mesh"):
        values.mesh("data=two")


def test_overrides():
    assert values.overrides(["alpha=0.7", "skip=a=b", "none="]) == {"alpha": "0.7", "skip": "a=b", "none": ""}


@pytest.mark.parametrize("pairs", [["bits"], ["=4"], ["two words=4"], ["bits=4", "bits=8"]])
def test_what_is_no_override(pairs):
    with pytest.raises(UserError, match="--set"):
        values.overrides(pairs)


def test_prompts_come_from_options_or_a_file(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a red disc\n\n  a blue star  \n")
    assert values.prompts((), file) == ["a red disc", "a blue star"]
    assert values.prompts(("typed",), None) == ["typed"]
    assert values.prompts((), None) is None


def test_prompts_refused(tmp_path):
    (empty := tmp_path / "empty.txt").write_text("\n\n")
    (binary := tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    for given, file, said in [((), empty, "no prompt"), ((), binary, "UTF-8"), (("typed",), empty, "both")]:
        with pytest.raises(UserError, match=said):
            values.prompts(given, file)
    with pytest.raises(FileNotFoundError):
        values.prompts((), tmp_path / "missing.txt")


@hypothesis.given(strategies.text())
@hypothesis.example("\u0663")  # a digit to a regular expression and to int()
def test_any_text_is_understood_or_refused(text):
    with contextlib.suppress(UserError):
        assert all(seed >= 0 for seed in values.seeds(text))
