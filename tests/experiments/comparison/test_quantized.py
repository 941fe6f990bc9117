"""The comparison of quantized models: rows are recipes, results are kept, the page counts right."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import pytest
import small_models

import models
from experiments.comparison.quantized import page, run
from experiments.comparison.quantized.feature_measures import NAMES
from experiments.comparison.quantized.tables import TRANSFORMERS, UNETS, table_of
from experiments.comparison.results import file_of
from experiments.moving_shapes import train
from qvdjax.errors import UserError
from qvdjax.nn import layers_of
from qvdjax.recipes import decide


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A bench model of one narrow block, with a prediction that is no zero."""
    small = {**train.CONFIGS["wan"], "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 48}
    model = train.initial_model(0, small)
    model.proj_out.weight[...] = 0.3 * jax.random.normal(jax.random.key(1), model.proj_out.weight.shape, jnp.float32)
    folder = tmp_path_factory.mktemp("models")
    train.save_folder(model, folder / "small")
    return folder


SEEDED = {
    "quarot", "adaround", "ptq4dit", "vidit-q", "dvd-quant", "orbitquant", "flatquant", "q-vdit", "s2q-vdit", "ptq4dm",
    "q-diffusion", "tfmq-dm", "tdq", "tcaq-dm",
}  # fmt: skip


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in (TRANSFORMERS, UNETS) for name in table.rows])
def test_every_row_is_a_recipe(table, name):
    row = table.rows[name]
    assert row.recipe("w4a4", 0).name.endswith("-w4a4")
    learns = row.method == "qvd" and row.options.get("learn", False)
    assert (row.recipe("w4a4", 0) != row.recipe("w4a4", 1)) == (row.method in SEEDED or learns)


@pytest.mark.parametrize("table", [TRANSFORMERS, UNETS])
def test_what_is_asked_about_rows_is_about_rows(table):
    assert table.ablated in table.rows
    assert table.ablations
    for ahead, others in table.expected:
        assert {ahead, *others} <= set(table.rows)
        assert ahead not in others


def test_rows_of_unets_quantize_the_same_layers():
    model = models.abstract(small_models.UNET)
    found = {}
    for name, row in UNETS.rows.items():
        schemes = {n: s for n, s in decide(model, row.recipe("w6a6")).schemes.items() if hasattr(s, "weight")}
        bits = {
            layer: (scheme.weight and scheme.weight.bits, scheme.activation and scheme.activation.bits)
            for layer, scheme in schemes.items() if "time_emb_proj" not in layer
        }  # fmt: skip
        # Temporal features are rounded in all rows, some on grids that are not an activation quantizer's.
        features = [scheme for layer, scheme in schemes.items() if "time_emb_proj" in layer]
        assert all(s.weight.bits == 6 for s in features)
        assert all(s.activation is not None for s in features) or row.recipe("w6a6").feature_grids is not None, name
        inputs = [s.activation for layer, s in schemes.items() if s.activation and "time_emb_proj" not in layer]
        assert not any(a.symmetric or a.dynamic for a in inputs), name
        found[name] = bits
    assert all(bits == found["min-max"] for bits in found.values())
    assert "convolution" in {layer.role for names, _, layer in layers_of(model) if found["QVD"].get(names[0]) == (6, 6)}


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


@pytest.mark.slow
def test_a_unet_has_rows_and_measures_of_its_own(tmp_path, monkeypatch, capsys):
    one_level = {
        "block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
    }  # fmt: skip
    model = small_models.unet(**{**train.CONFIGS["animatediff"], **one_level})
    models.save(model, tmp_path / "models" / "animatediff")
    dataclasses.replace(train.pipeline("animatediff"), steps=4).save(tmp_path / "models" / "animatediff")
    monkeypatch.setattr(run, "CHECKPOINTS", tmp_path / "models")
    out = tmp_path / "ptq-animatediff-w6a6"
    counts = ["--seeds", "0", "--prompts", "1", "--clips", "2", "--bits", "w6a6", "--out", str(out)]
    run.main(["--model", "animatediff", *counts, "--rows", "min-max", "QVD"])
    found = {name: json.loads(file_of(out, name, 0).read_text()) for name in ("min-max", "QVD")}
    for name, one in found.items():
        assert one["recipe"] == f"{UNETS.rows[name].method}-w6a6"
        assert 0 < one["frechet_random_features"] < float("inf")
        for side in ("input", "output"):
            assert set(one["temporal_features"][side]) == set(NAMES)
    identity = {name: one["temporal_features"]["input"]["identity_rate"] for name, one in found.items()}
    assert 0 <= identity["min-max"] <= identity["QVD"] <= 1  # which chooses its grid by it
    capsys.readouterr()
    assert page.main([str(out)]) == 0
    text = (out / "README.md").read_text()
    assert "it is not FVD" in text
    assert "| identity | collapse | after the layer dB |" in text
    assert "QVD before min-max" in text
    assert "MSE (0 of 1)" in text


def test_rows_of_another_model_are_refused(tmp_path, capsys):
    assert table_of("animatediff-outlier") is UNETS
    assert table_of("wan-outlier") is table_of("cogvideox") is TRANSFORMERS
    with pytest.raises(SystemExit):
        run.main(["--model", "animatediff", "--rows", "RTN", "--out", str(tmp_path / "out")])
    assert "no rows of animatediff: RTN; there are min-max, MSE" in capsys.readouterr().err


def result(row: str, seed: int, errors: list[float]) -> dict:
    entry = lambda value: {"mean": value, "per_prompt": [value, value]}  # noqa: E731
    scores = {name: entry(0.9) for name in page.SCORES}
    return {
        "row": row, "seed": seed, "recipe": f"{TRANSFORMERS.rows[row].method}-w4a4", "seconds": 12.0,
        "teacher_forced_error": {"mean": sum(errors) / len(errors), "per_prompt": errors},
        "psnr": entry(20.0), "ssim": entry(0.8), "oracle": {"reference": scores, "candidate": scores},
        "protocol": {"prompts": 1, "clips": 2}, "jax": "0", "device": "cpu",
    }  # fmt: skip


def test_expectations_are_judged_by_paired_differences():
    ahead = {"S2Q-VDiT": [result("S2Q-VDiT", 0, [0.1, 0.2])], "RTN": [result("RTN", 0, [0.2, 0.4])]}
    (line,) = page._findings(ahead, TRANSFORMERS)
    # -0.1 and -0.2 of 0.3 on the mean: -50 %.
    assert line.startswith("- S2Q-VDiT before RTN: holds, -50.0 % of error")
    behind = {**ahead, "RTN": [result("RTN", 0, [0.05, 0.3])]}
    (line,) = page._findings(behind, TRANSFORMERS)
    assert "**does not hold**" in line  # ahead on one prompt, behind on the other: no difference that is sure


def test_what_does_not_belong_in_a_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        page.write(tmp_path)
    assert page.main([str(tmp_path)]) == 2
