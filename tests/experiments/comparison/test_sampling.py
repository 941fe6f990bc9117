"""Ways of sampling on the bench: what each does to a model, and the page."""

import json

import pytest
from small_models import pipeline, sampled_folder

import models
from experiments.comparison.sampling import page, run
from experiments.comparison.sampling.rows import REFERENCE, ROWS
from experiments.moving_shapes.captions import TOKENS, WORDS
from qvdjax.errors import UserError
from qvdjax.nn.timestep_table import tables_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Wan with random weights that understands the bench's captions."""
    path = tmp_path_factory.mktemp("sampling") / "model"
    return sampled_folder(path, pipeline(WORDS, 8, tokens=TOKENS, steps=3))


def test_rows_are_compared_with_full_precision(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "CHECKPOINTS", folder.parent)
    rows = [REFERENCE, f"{REFERENCE}, one batch", "W4A4, guided until 800", "W4A4"]
    arguments = ["--model", folder.name, "--clips", "2", "--batch", "2", "--out", str(tmp_path), "--rows", *rows]
    run.main(arguments)
    found = {one["row"]: one for one in (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))}
    assert found.keys() == set(rows)
    assert found[REFERENCE]["psnr"] == [100.0, 100.0]
    # Two passes in one batch are the same sums in another order.
    assert min(found[rows[1]]["psnr"]) > 60
    assert max(found["W4A4"]["psnr"]) < 60
    assert [found[name]["passes"] for name in rows] == [6, 6, 5, 6]  # of timesteps 1000, 857 and 600
    before = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}
    run.main(arguments)  # nothing is missing
    assert before == {file: file.stat().st_mtime_ns for file in tmp_path.glob("*.json")}

    page.main([str(tmp_path)])
    text = (tmp_path / "README.md").read_text()
    assert "| full precision | 6 | 100.00 |  |" in text
    assert "| W4A4, guided until 800 | 5 |" in text
    assert "Seeds that are still to be run: " in text
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no results"):
        page.write(tmp_path / "empty")


@pytest.mark.parametrize("name", ["W8A8, tables", "W8A8, float attention first and last"])
def test_models_of_rows(folder, name):
    row = ROWS[name]
    model = row.model(models.load(folder), [900.0, 500.0, 100.0])
    assert model.recipe_name == "rtn-w8a8"
    scheme = model.stacks[0].block.attn1.attention.scheme
    assert (scheme.qk_bits, scheme.pv_bits) == (8, 8)
    assert bool(tables_of(model)) == row.tables
    precise = row.arguments(model)["precise"]
    assert (precise is not None) == any(row.float_attention)
    if precise is not None:
        assert (precise.first, precise.last) == (2, 1)
        assert precise.model.stacks[0].block.attn1.attention.scheme.qk_bits is None
