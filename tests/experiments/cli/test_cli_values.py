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


def test_processes():
    assert values.processes(False, None, None, None) is None
    assert values.processes(True, None, None, None) == {}
    found = values.processes(False, "host:8476", 2, 1)
    assert found == {"coordinator_address": "host:8476", "num_processes": 2, "process_id": 1}
    assert values.processes(False, "[::1]:8476", 1, 0)["coordinator_address"] == "[::1]:8476"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((True, "host:8476", 2, 0), "--distributed finds all processes itself"),
        ((True, None, 2, None), "--distributed finds all processes itself"),
        ((False, "host:8476", None, None), "--num-processes and --process-id are missing"),
        ((False, None, 2, 0), "--coordinator-address is missing"),
        ((False, "host:8476", 2, None), "--process-id is missing"),
        ((False, "host", 2, 0), "'host' is not HOST:PORT"),
        ((False, ":8476", 2, 0), "not HOST:PORT"),
        ((False, "host:port", 2, 0), "not HOST:PORT"),
        ((False, "host:70000", 2, 0), "not HOST:PORT"),
        ((False, "host:8476", 0, 0), "--num-processes is 0"),
        ((False, "host:8476", 2, 2), "--process-id is 2 of 2"),
        ((False, "host:8476", 2, -1), "--process-id is -1 of 2"),
    ],
)
def test_processes_that_cannot_be_joined(given, said):
    with pytest.raises(UserError, match=said):
        values.processes(*given)


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
