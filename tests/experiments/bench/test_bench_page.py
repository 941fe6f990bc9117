import copy
import json

import pytest

from experiments.bench import page
from qvdjax.errors import UserError

ROW = {
    "name": "linear/rtn-w4a8", "shape": "tiny", "median_ms": 2.0, "spread_ms": 0.1,
    "reference_median_ms": 3.0, "ratio": 1.5, "ceiling": 1.9, "relative_error": 0.09,
    "weight_bytes": 2**20, "reference_weight_bytes": 2**22, "scaled": None,
}  # fmt: skip
RATES = {"size": 8, "float_dtype": "float32", "float_tera_ops": 1.0, "int8_tera_ops": 1.9, "factor": 1.9}
REPORT = {
    "device": "Some Device", "command": "bench --suite tiny", "rates": RATES,
    "versions": {"jax": "9.9.9", "backend": "maker 1"}, "results": [ROW], "failed": [], "left_out": [],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "machine.json").write_text(json.dumps(REPORT))
    return tmp_path


def test_the_page_holds_what_was_measured(folder, capsys):
    assert page.main([str(folder)]) == 0
    text = (folder / "README.md").read_text()
    assert "| tiny | linear/rtn-w4a8 | 2 | 0.1 | 3 | **1.50** | 1.90 | 9.0e-02 | 1 of 4 |" in text
    assert "Some Device" in text
    assert "jax 9.9.9" in text
    assert (folder / "machine.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "machine.png") in capsys.readouterr().out


def test_what_failed_was_left_out_or_scaled_is_said():
    report = copy.deepcopy(REPORT)
    report["results"][0]["scaled"] = "too large"
    report["failed"] = [{"name": "step/a", "shape": "s", "reason": "no memory"}]
    report["left_out"] = [{"name": "block", "shape": "s", "reason": "the budget"}]
    text = page.page({"machine": report})
    for line in (
        "- tiny step: too large",
        "- step/a at s failed: no memory",
        "- block at s was left out: the budget",
    ):
        assert line in text


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_file_that_is_no_report_is_refused(folder, content, capsys):
    (folder / "other.json").write_text(content)
    with pytest.raises(UserError, match="other.json"):
        page.write(folder)
    assert page.main([str(folder)]) == 2
    assert "other.json" in capsys.readouterr().err


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="qvdjax bench"):
        page.write(tmp_path)


def test_the_committed_page_is_the_one_its_files_give():
    written, measured = page.FOLDER / "README.md", sorted(page.FOLDER.glob("*.json"))
    assert written.exists() == bool(measured)
    if measured:
        assert written.read_text() == page.page(page.load(page.FOLDER))
