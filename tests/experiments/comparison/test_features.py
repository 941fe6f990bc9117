"""Grids of temporal features on a small UNet: what is measured is what a quantized model does, and the page."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import pipeline, sampled_folder, unet

import models
import qvdjax
from experiments.comparison.features import page, run
from experiments.moving_shapes.captions import TOKENS, WORDS
from qvdjax.errors import UserError
from qvdjax.metrics import relative_error
from qvdjax.recipes import get

ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"], "in_channels": 12, "out_channels": 12, "cross_attention_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A UNet with random parameters that understands the bench's captions."""
    path = tmp_path_factory.mktemp("features") / "unet"
    models.save(unet(**ONE_LEVEL), path)
    pipeline(WORDS, 8, tokens=TOKENS, solver="ddim", shift=None, steps=4).save(path)
    return path


@pytest.fixture(scope="module")
def bench(folder):
    """Two prompts of it."""
    return run.Bench.of(folder, 2)


def test_tables_of_the_vectors_as_they_are_change_nothing(bench):
    assert (bench.errors({}) == 0).all()
    outputs = {name: bench.layers[name](jnp.asarray(x)) for name, x in bench.features.items()}
    # The same products, in a program of their own: float32 rounding.
    assert bench.errors(outputs).max() < 1e-10


def test_only_the_vectors_are_rounded(folder, bench):
    """Predictions are those of a model that is quantized so, but for weights, which have eight bits there."""
    grid, bits = "asymmetric", 3
    others = r".*\.(conv\d?|conv_shortcut|proj|proj_in|proj_out|to_[qkv]|0|2)"  # all layers but those of the timestep
    recipe = get(f"rtn-w8a{bits}", temporal_features=grid, skip=others)
    exact = models.load(folder)
    quantized = qvdjax.quantize(exact, recipe, bench.trajectories, execution="simulate")
    predict = jax.jit(lambda model, inputs: model(**inputs))
    wanted = [
        relative_error(predict(quantized, inputs), predict(exact, inputs), axis=(1, 2, 3, 4)).mean()
        for inputs in bench.trajectories
    ]
    found = bench.measured(run.on_grid(run.grids(bits)[grid]))
    # Weights of eight bits err by a thirtieth of what inputs of three do, in a direction of their own.
    assert found["error"]["mean"] == pytest.approx(float(np.mean(wanted)), rel=0.1)


def test_more_bits_are_better(bench):
    few, many = (bench.measured(run.roundings(bits)["asymmetric, a range each timestep"][1]) for bits in (3, 8))
    assert many["after"] > few["after"] + 20  # decibels; five bits are some thirty
    assert many["error"]["mean"] < few["error"]["mean"] / 100
    assert many["error"]["low"] <= many["error"]["mean"] <= many["error"]["high"]
    assert many["collapse"] <= few["collapse"]


def test_a_range_each_timestep_is_the_timesteps_own():
    features = jnp.asarray([[-0.25, 0.0, 0.1, 2.3], [-0.25, 0.0, 0.1, 9.7]])
    found = run.on_timesteps(4)(features)
    for one, rounded in zip(features, found, strict=True):
        step = float(one.max() - one.min()) / 15
        assert float(jnp.abs(one - rounded).max()) <= step * (1 + 1e-5)  # the zero point is rounded to a whole step
        assert float(rounded[1]) == 0.0  # exactly a code


def test_one_file_a_model_and_its_page(folder, bench, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "BITS", (4, 8))
    run.main(["--model", str(folder), "--prompts", "1", "--out", str(tmp_path / "temporal-features-unet")])
    found = json.loads((tmp_path / "temporal-features-unet" / run.FILE).read_text())
    assert (found["model"], found["prompts"], found["layers"]) == ("unet", 1, len(bench.layers))
    assert len(found["rows"]) == len(run.roundings(8)) * 2
    for chosen in found["chosen"].values():
        assert all(sum(taken.values()) == found["layers"] for taken in chosen.values())
    capsys.readouterr()
    assert page.main([str(tmp_path / "temporal-features-unet")]) == 0
    text = (tmp_path / "temporal-features-unet" / "README.md").read_text()
    assert "| grid | 4 bits | 8 bits |" in text
    for score, mark in page.MARKS.items():
        for bits, taken in found["chosen"][score].items():
            for name in taken:
                [row] = [line for line in text.splitlines() if line.startswith(f"| {name} |")][:1]
                assert mark in row
            assert f"- {bits} bits: by collapse" in text
    assert (tmp_path / "temporal-features-unet" / page.PLOT).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "empty").mkdir()
    assert page.main([str(tmp_path / "empty")]) == 2
    assert "experiments.comparison.features.run" in capsys.readouterr().err


def test_models_without_temporal_features_are_refused(tmp_path):
    path = sampled_folder(tmp_path / "wan", pipeline(WORDS, 8, tokens=TOKENS))
    with pytest.raises(UserError, match="no layers that add the timestep"):
        run.Bench.of(path, 1)
