"""The comparison of quantized models: rows are recipes, results are kept, the page counts right."""

import json
import re

import jax
import jax.numpy as jnp
import pytest
import small_models

import models
import qvdjax
from experiments.comparison.quantized import page, run
from experiments.comparison.quantized.feature_measures import NAMES, feature_measures
from experiments.comparison.quantized.tables import TRANSFORMERS, UNETS, table_of
from experiments.comparison.results import file_of
from experiments.moving_shapes import train
from qvdjax.errors import UserError
from qvdjax.nn import layers_of
from qvdjax.recipes import decide, get


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
    "quarot", "adaround", "ptq4dit", "vidit-q", "dvd-quant", "orbitquant", "flatquant", "q-vdit", "s2q-vdit", "best",
    "ptq4dm", "q-diffusion", "tfmq-dm", "tdq", "tcaq-dm", "best-unet",
}  # fmt: skip


@pytest.mark.parametrize(("table", "name"), [(table, name) for table in (TRANSFORMERS, UNETS) for name in table.rows])
def test_every_row_is_a_recipe(table, name):
    row = table.rows[name]
    assert row.recipe("w4a4", 0).name.endswith("-w4a4")
    learns = row.method == "qvd" and row.options.get("learn", False)
    assert (row.recipe("w4a4", 0) != row.recipe("w4a4", 1)) == (row.method in SEEDED or learns)


@pytest.mark.parametrize("table", [TRANSFORMERS, UNETS])
def test_what_is_asked_about_rows_is_about_rows(table):
    assert {whole for _, whole in table.ablations} == set(table.ablated) <= set(table.rows)
    assert all(name in table.rows and name.startswith(f"{whole},") for name, whole in table.ablations)
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
    before = jax.jit(lambda x: x + 1)
    before(1.0)
    run.main([*options, "RTN"])
    assert before._cache_size() == 0  # what was compiled before a row is gone after it
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
    assert f"]({page.PLOT})" in text
    assert (tmp_path / "ptq-small-w8a8" / page.PLOT).read_bytes().startswith(b"\x89PNG")
    assert re.search(r"\| \d+ s \|", text)  # processor time, which these results have


def test_temporal_features_are_measured_before_and_behind_their_layers():
    model = small_models.randomised(small_models.ResnetUNet())
    batches = [
        {**small_models.unet_inputs(batch=1, seed=s), "timestep": jnp.full((1,), 999.0 - 100 * s)} for s in range(4)
    ]
    found = {}
    for bits in (3, 8):
        grid = {"temporal_features": "asymmetric", "activation_symmetric": False}
        quantized = qvdjax.quantize(model, get(f"minmax-w{bits}a{bits}", **grid), batches)
        found[bits] = feature_measures(model, quantized, batches)
        assert {side: set(measures) for side, measures in found[bits].items()} == dict.fromkeys(
            ("input", "output"), set(NAMES)
        )
    for side in ("input", "output"):
        assert found[3][side]["centred_sqnr_db"] < found[8][side]["centred_sqnr_db"] - 10  # five bits: some 30 dB
    assert found[3]["input"]["collapse"] > found[8]["input"]["collapse"]
    assert found[8]["input"]["identity_rate"] == 1
    plain = qvdjax.quantize(model, "minmax-w8a8", batches)
    exact = feature_measures(model, plain, batches)
    assert exact["input"]["centred_sqnr_db"] is None  # nothing is rounded
    assert exact["output"]["centred_sqnr_db"] > 20  # but weights
    assert feature_measures(model, plain, batches[:1]) is None


def test_the_page_of_unets_has_columns_of_its_own(tmp_path):
    folder = tmp_path / "ptq-animatediff-w6a6"
    folder.mkdir()
    measures = dict.fromkeys(NAMES, 0.5)
    for name, errors in (("QVD", [0.1, 0.2]), ("min-max", [0.2, 0.4])):
        found = {
            **result(name, 0, errors, UNETS), "frechet_random_features": 0.25,
            "temporal_features": {"input": measures, "output": {**measures, "centred_sqnr_db": None}},
        }  # fmt: skip
        file_of(folder, name, 0).write_text(json.dumps(found))
    text = page.write(folder)[0].read_text()
    assert "it is not FVD" in text
    assert "| quantized in | Fréchet, random features | identity | collapse | after the layer dB |" in text
    assert "| 1,024 | 12 s wall | 0.25 | 0.5 | 0.5 | - |" in text
    assert "7,168 in" in text
    assert "QVD before min-max: holds" in text
    assert "MSE (0 of 1)" in text


def test_rows_of_another_model_are_refused(tmp_path, capsys):
    assert table_of("animatediff-outlier") is UNETS
    assert table_of("wan-outlier") is table_of("cogvideox") is TRANSFORMERS
    with pytest.raises(SystemExit):
        run.main(["--model", "animatediff", "--rows", "RTN", "--out", str(tmp_path / "out")])
    assert "no rows of animatediff: RTN; there are min-max, MSE" in capsys.readouterr().err


def result(row: str, seed: int, errors: list[float], table=TRANSFORMERS) -> dict:
    entry = lambda value: {"mean": value, "per_prompt": [value, value]}  # noqa: E731
    scores = {name: entry(0.9) for name in page.SCORES}
    return {
        "row": row, "seed": seed, "recipe": f"{table.rows[row].method}-w4a4", "seconds": 12.0,
        "teacher_forced_error": {
            "mean": sum(errors) / len(errors), "per_prompt": errors,
            "by_step": {"mean": errors, "low": errors, "high": errors},
        },
        "psnr": entry(20.0), "ssim": entry(0.8), "oracle": {"reference": scores, "candidate": scores},
        "weight_bytes": {"reference": 7 * 2**20, "candidate": 2**20},
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


def test_scores_are_compared_clip_by_clip():
    found = result("Ours", 0, [0.1, 0.2])
    found["oracle"]["candidate"] = {
        **found["oracle"]["candidate"], "shape": {"mean": 0.4, "per_prompt": [0.3, 0.5]},
    }  # fmt: skip
    (line,) = page._scores({"Ours": [found], "RTN": [result("RTN", 0, [0.2, 0.4])]}, TRANSFORMERS)
    # 0.3 and 0.5 against 0.9: 60 and 40 points less; the bootstrap of two values lies between these.
    assert line.startswith("- Ours, oracle against full precision in points of 100: colour +0.0 (+0.0 to +0.0), ")
    assert "shape -50.0 (-60.0 to -40.0)" in line
    assert "their mean -16.7 (-20.0 to -13.3)" in line
    assert "over 2 clips, 1 seed" in line


def test_what_does_not_belong_in_a_table_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no results"):
        page.write(tmp_path)
    assert page.main([str(tmp_path)]) == 2
