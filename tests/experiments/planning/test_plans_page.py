"""The committed plans: the page is the one that the files make, and the names are plans that can be asked for."""

import inspect
import json

import pytest

from experiments.planning import overhead, page, plan, vae
from experiments.planning.page import FOLDER, PLANS, main

REPORT = {
    "model": "wan", "recipe": "qvgen-w4a4", "topology": "v5e:2x4", "step": "train", "batch": 8, "accumulate": 2,
    "mesh": {"data": 1, "fsdp": 2, "context": 4, "tensor": 1}, "fits": True, "bytes_per_chip": 3 * 2**30,
    "chip_bytes": 16 * 2**30, "compile_seconds": 61.4, "bound_seconds": 1.2345, "bound_by": "memory",
    "collectives": [
        {"kind": "all-gather", "dtype": "s8", "bytes": 5 * 2**20, "count": 2},
        {"kind": "all-reduce", "dtype": "f32", "bytes": 2**31, "count": 1},
        {"kind": "all-reduce", "dtype": "bf16", "bytes": 2**30, "count": 1},
    ],
    "versions": {"jax": "1", "libtpu": "2"},
}  # fmt: skip


def test_the_committed_page_is_the_one_its_files_make():
    files = {name: FOLDER / f"{name}.json" for name in PLANS}
    reports = {name: json.loads(path.read_text()) for name, path in files.items() if path.exists()}
    assert reports
    others = [FOLDER / name for name in (overhead.FILE, vae.FILE)]
    assert {path.stem for path in FOLDER.glob("*.json")} <= {*PLANS, *(path.stem for path in others)}
    found = [json.loads(path.read_text()) for path in others]
    assert (FOLDER / "README.md").read_text() == page.page(reports, *found)
    # What users are told: by the scan a chip needs a quarter of what one pass does, or less.
    assert found[1]["size"] == [81, 480, 832]
    assert found[1]["ratio"] <= 0.25


@pytest.mark.parametrize("name", PLANS)
def test_every_plan_can_be_asked_for(name):
    inspect.signature(plan).bind(**PLANS[name])


def test_a_row_says_what_travels():
    row = next(line for line in page.page({"one": REPORT}).splitlines() if line.startswith("| wan"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "wan", "qvgen-w4a4", "v5e:2x4", "fsdp 2, context 4", "8 in 2", "3.00 of 16.00 GiB", "yes", "s8 5 MiB",
        "all-reduce 3.00 GiB", "1.23 s (memory)", "61 s",
    ]  # fmt: skip
    assert "| 61 s (97 s) |" in page.page({"one": {**REPORT, "compile_processor_seconds": 97.2}})
    assert "**no**" in page.page({"one": {**REPORT, "fits": False, "bytes_per_chip": None, "bound_seconds": None}})


def test_missing_plans_are_compiled_and_others_left(tmp_path, monkeypatch, capsys):
    asked = []

    def compile_one(**arguments):
        asked.append(arguments)
        return {**REPORT, "model": arguments["model"]}

    monkeypatch.setattr("experiments.planning.plan", compile_one)
    first, second, *others = PLANS
    for name in (first, *others):
        (tmp_path / f"{name}.json").write_text(json.dumps(REPORT))
    assert main(["--folder", str(tmp_path)]) == 0
    assert asked == [PLANS[second]]
    assert f"{second}: fits; compiled in 61 s" in capsys.readouterr().out
    assert PLANS[second]["model"] in (tmp_path / "README.md").read_text()
    main(["--folder", str(tmp_path), "--again", first])
    assert asked[1:] == [PLANS[first]]
    main(["--folder", str(tmp_path), "--only-page"])
    assert len(asked) == 2


def test_what_phi_adds_is_a_ratio_of_two_compilations(tmp_path, monkeypatch, capsys):
    def compile_one(model, recipe, *, overrides, layers=None, **arguments):
        plain = overrides == overhead.WITHOUT
        assert plain or overrides == ({"phases": "keep"} if layers else {})
        return {"compiler_flops": 2e12 if plain else 2.1e12, "compiler_bytes": 2**30, "bytes_per_chip": 2**33}

    monkeypatch.setattr("experiments.planning.plan", compile_one)
    assert overhead.main(["--folder", str(tmp_path)]) == 0
    ratios = json.loads(capsys.readouterr().out)
    assert ratios == {"flops": 1.05, "bytes": 1.0, "memory": 1.0, "time": 1.05}
    text = page.page({"one": REPORT}, json.loads((tmp_path / overhead.FILE).read_text()))
    assert "| operations of one block's step | 2.1 TFLOP | 2 TFLOP | 1.050 |" in text
