"""The comparison of quantized models: rows are recipes, results are kept, the page counts right."""

import json
import re

import jax
import jax.numpy as jnp
import pytest

from experiments.comparison.quantized import page, run
from experiments.comparison.quantized.rows import ROWS
from experiments.comparison.results import file_of
from experiments.moving_shapes import train
from qvdjax.errors import UserError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A bench model of one narrow block, with a prediction that is no zero."""
    small = {**train.CONFIGS["wan"], "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 48}
    model = train.initial_model(0, small)
    model.proj_out.weight[...] = 0.3 * jax.random.normal(jax.random.key(1), model.proj_out.weight.shape, jnp.float32)
    folder = tmp_path_factory.mktemp("models")
    train.save_folder(model, folder / "small")
    return folder


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_recipe(name):
    assert ROWS[name].recipe("w4a4", 0).name.endswith("-w4a4")
    seeded = ROWS[name].recipe("w4a4", 0) != ROWS[name].recipe("w4a4", 1)
    assert seeded == (ROWS[name].method in (
        "quarot", "adaround", "ptq4dit", "vidit-q", "dvd-quant", "orbitquant", "flatquant", "q-vdit", "s2q-vdit",
    ))  # fmt: skip


def test_rows_are_measured_once_and_kept(checkpoints, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "CHECKPOINTS", checkpoints)
    counts = ["--seeds", "0", "--prompts", "1", "--clips", "2"]
    options = ["--model", "small", *counts, "--out", str(tmp_path / "ptq-small-w8a8"), "--bits", "w8a8", "--rows"]
    run.main([*options, "RTN"])
    path = file_of(tmp_path / "ptq-small-w8a8", "RTN", 0)
    found, written = json.loads(path.read_text()), path.stat().st_mtime_ns
    assert found["recipe"] == "rtn-w8a8"
    assert 0 < found["teacher_forced_error"]["mean"] < 0.01
    assert len(found["psnr"]["per_prompt"]) == 2
    run.main([*options, "RTN", "SmoothQuant"])
    assert path.stat().st_mtime_ns == written
    assert file_of(tmp_path / "ptq-small-w8a8", "SmoothQuant", 0).exists()
    capsys.readouterr()
    assert page.main([str(tmp_path / "ptq-small-w8a8")]) == 0
    text = (tmp_path / "ptq-small-w8a8" / "README.md").read_text()
    assert "W8A8 on the bench's small" in text
    assert "`smoothquant-w8a8`" in text
    assert "QuaRot (0 of 1)" in text
    assert re.search(r"\d+ s \(\d+ s\)", text)  # wall clock and processor time


def result(row: str, seed: int, errors: list[float]) -> dict:
    entry = lambda value: {"mean": value, "per_prompt": [value, value]}  # noqa: E731
    scores = {name: entry(0.9) for name in page.SCORES}
    return {
        "row": row, "seed": seed, "recipe": f"{ROWS[row].method}-w4a4", "seconds": 12.0,
        "teacher_forced_error": {"mean": sum(errors) / len(errors), "per_prompt": errors},
        "psnr": entry(20.0), "ssim": entry(0.8), "oracle": {"reference": scores, "candidate": scores},
        "protocol": {"prompts": 1, "clips": 2}, "jax": "0", "device": "cpu",
    }  # fmt: skip


def test_expectations_are_judged_by_paired_differences():
    ahead = {"S2Q-VDiT": [result("S2Q-VDiT", 0, [0.1, 0.2])], "RTN": [result("RTN", 0, [0.2, 0.4])]}
    (line,) = page._findings(ahead)
    # -0.1 and -0.2 of 0.3 on the mean: -50 %.
    assert line.startswith("- S2Q-VDiT before RTN: holds, -50.0 % of error")
    behind = {**ahead, "RTN": [result("RTN", 0, [0.05, 0.3])]}
    (line,) = page._findings(behind)
    assert "**does not hold**" in line  # ahead on one prompt, behind on the other: no difference that is sure


def test_what_does_not_belong_in_a_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        page.write(tmp_path)
    assert page.main([str(tmp_path)]) == 2
