"""The bench of a training step: both variants take the same steps of learning, and the page holds what was measured."""

import json

import pytest

from experiments.bench import page, shapes, training

CONFIG = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 16, "ffn_dim": 32,
    "num_layers": 2,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(shapes.CONFIGS, "small", CONFIG)
    monkeypatch.setitem(shapes.LATENT_SIZES["wan"], "small", (3, 4, 6))


@pytest.mark.slow
def test_a_step_is_timed_with_phi_and_without(small, tmp_path, capsys):
    file = tmp_path / "training" / "machine.json"
    assert training.main(["--model", "small", "--size", "small", "--repeats", "2", "--output", str(file)]) == 0
    report = json.loads(capsys.readouterr().out)
    assert json.loads(file.read_text()) == report
    own, without = report["results"]["with Phi"], report["results"]["without Phi"]
    # One that was not timed and two that were; each a step of learning from its own state.
    assert all(len(set(run["loss"])) == 3 and min(run["loss"]) > 0 for run in (own, without))
    # Phi begins with what rounding takes away, so the first loss is smaller by construction.
    assert own["loss"][0] < without["loss"][0]
    assert own["bytes"] > without["bytes"]
    assert report["ratios"]["bytes"] == own["bytes"] / without["bytes"]
    assert report["ratios"]["time"] == own["median_ms"] / without["median_ms"]
    text = "\n".join(training.section({"machine": report}))
    assert f"| **{report['ratios']['time']:.3f}** |" in text
    assert "Pending" not in text
    assert "Pending" in page.page({})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "nothing"], "no model is called 'nothing'"),
        (["--repeats", "0"], "0 repeats"),
        (["--size", "huge"], "unknown size 'huge'"),
        (["--recipe", "lsq-w4a4"], "rank"),
    ],
)
def test_what_cannot_be_timed_is_one_line(options, words, capsys):
    assert training.main(options) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
