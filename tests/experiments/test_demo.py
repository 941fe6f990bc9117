"""The demo, whole: what it prints and leaves behind."""

import json

import pytest

from experiments import demo


@pytest.mark.slow
@pytest.mark.optimized
def test_the_demo_ends_with_a_table_and_a_report(tmp_path, capsys):
    output = tmp_path / "demo"
    assert demo.main(["--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for recipe in demo.RECIPES:
        assert recipe in printed
        assert (output / recipe / "config.json").exists()
    metrics = json.loads((output / "report" / "metrics.json").read_text())["candidates"]
    errors = {recipe: metrics[recipe]["teacher_forced_error"]["mean"] for recipe in demo.RECIPES}
    assert 0 < errors["rtn-w8a8"] < errors["rtn-w4a8"] < errors["rtn-w4a4"] < 1
    # 8 bits are near-lossless: two operands of 2**-8 relative error in each of some 60 products, squared.
    assert errors["rtn-w8a8"] < 5e-3
    assert (output / "report" / "report.html").stat().st_size > 10_000
    assert list((output / "report" / "videos").glob("*.mp4"))


def test_a_folder_that_is_no_demo_is_not_removed(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("keep")
    assert demo.main(["--output", str(tmp_path)]) == 2
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert "no earlier demo" in capsys.readouterr().err
