"""Single files that appear complete or not at all; folders have their tests in test_checkpoint_folder."""

import os

import pytest

from qvdjax.checkpoint.atomic import new_file
from qvdjax.errors import UserError


def write(path, *words, error=None):
    with new_file(path) as temporary, temporary.open("w") as file:
        for word in words:
            file.write(word)
        if error:
            raise error


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "report.json"
    with new_file(path) as temporary:
        temporary.write_text("new")
        assert not path.exists()
        assert temporary.parent == tmp_path  # so that the renaming stays within one file system
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["report.json"]
    mask = os.umask(0)
    os.umask(mask)
    assert oct(path.stat().st_mode & 0o777) == oct(0o666 & ~mask)


def test_a_file_that_was_there_is_replaced_and_until_then_whole(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with new_file(str(path)) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_what_breaks_in_the_body_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(KeyError):
        write(path, "ne", error=KeyError("w"))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["report.json"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match=r"report\.json cannot be written: No space left.*free some space"):
        write(tmp_path / "report.json", "ne", error=OSError(28, "No space left on device"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["missing/report.json", "file/report.json", "folder"])
def test_targets_that_cannot_be_written_are_named(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=f"{name} cannot be written"):
        write(tmp_path / name, "x")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
