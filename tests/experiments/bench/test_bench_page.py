import copy
import json

import pytest

from experiments.bench import estimates, page
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
    assert "| tiny | linear/rtn-w4a8 | 2 | 0.1 | 3 | **1.50** | 1.90 | 9.0e-02 | 1 of 4 |  |  |  |" in text
    assert "Some Device" in text
    assert "jax 9.9.9" in text
    assert (folder / "machine.png").read_bytes().startswith(b"\x89PNG")
    assert str(folder / "machine.png") in capsys.readouterr().out


def test_rows_of_other_programs_and_what_computed_ours():
    report = copy.deepcopy(REPORT)
    more = {"fraction_of_peak": 0.625, "least_bytes": 3 * 2**20, "implementation": "pallas_tpu", "rival": False}
    report["results"][0].update(more)
    rival = {"name": "linear/torch", "rival": True, "relative_error": None, "fraction_of_peak": None,
             "least_bytes": None, "implementation": None, "weight_bytes": 0}  # fmt: skip
    report["results"].append({**ROW, **rival})
    report["rates"] = {**RATES, "memory_giga_bytes": 12.5}
    text = page.page({"machine": report})
    assert "**1.50** | 1.90 | 9.0e-02 | 1 of 4 | 0.62 | 3 | pallas_tpu |" in text
    assert "| tiny | *linear/torch* | 2 | 0.1 | 3 | **1.50** |  |  |  |  |  |  |" in text
    assert "memory 12.5 GB/s" in text


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
        trained, estimated = ({path.stem: json.loads(path.read_text()) for path in (page.FOLDER / part).glob("*.json")}
                              for part in ("training", "estimates"))  # fmt: skip
        assert written.read_text() == page.page(page.load(page.FOLDER), trained, next(iter(estimated.values()), None))


def test_cycles_are_compared_with_full_precision_and_said_to_be_estimates():
    rows = [
        {"topology": "v5e:1x1", "program": program, "recipe": recipe, "cycles": cycles, "integers": 0}
        for program in estimates.PROGRAMS
        for recipe, cycles in (("bfloat16", 40_000_000), ("rtn-w8a8", 26_000_000), ("rtn-w4a8", 24_000_000))
    ]
    report = {"tokens": 32760, "versions": {"jax": "1", "libtpu": "2"}, "results": rows}
    text = page.page({"machine": REPORT}, None, report)
    assert "| v5e:1x1 | first layer | 40.0 | 26.0 | **0.65** | 24.0 | **0.60** |  |  | 0 B |" in text
    assert sum(line.startswith("| v5e:1x1 |") for line in text.splitlines()) == len(estimates.PROGRAMS)
    assert "estimates, no timings" in text


def test_the_gpu_is_pending_until_a_report_has_one():
    assert "**Pending**" in page.page({"machine": REPORT})
    assert "**Pending**" not in page.page({"machine": {**REPORT, "platform": "gpu"}})
