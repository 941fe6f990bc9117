"""The comparison: rows are recipes, a run measures what it says, results are kept, the page counts right."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.comparison.results import file_of
from experiments.comparison.trained import page, run
from experiments.comparison.trained.rows import ROWS
from experiments.comparison.trained.run import Protocol, Reference, compare, measure
from experiments.moving_shapes import train
from qvdjax.errors import UserError

TINY = Protocol(steps=11, batch=2, warm_up=1, validation=4, clips=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A bench model of one narrow block, with a prediction that is no zero."""
    small = {**train.CONFIGS["wan"], "num_layers": 1, "num_attention_heads": 1, "ffn_dim": 48}
    model = train.initial_model(0, small)
    shape = model.proj_out.weight.shape
    model.proj_out.weight[...] = 0.3 * jax.random.normal(jax.random.key(1), shape, jnp.float32)
    path = tmp_path_factory.mktemp("models") / "small"
    train.save_folder(model, path)
    return path


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_a_recipe(name):
    assert ROWS[name].recipe("w4a4").name.endswith("-w4a4")


def test_a_model_is_no_distance_from_itself_and_louder_ones_are_far(folder):
    reference = Reference(folder, TINY)
    found = measure(models.load(folder), reference)
    assert found["validation"] == 0
    assert found["psnr"] == 100  # the ceiling of equal videos
    louder = models.load(folder)
    louder.proj_out.weight[...] *= 1.5
    louder.proj_out.bias[...] *= 1.5
    # Half as much again, squared; float32.
    assert measure(louder, reference, videos=False)["validation"] == pytest.approx(0.25, rel=1e-4)


@pytest.mark.slow
def test_a_row_is_trained_and_measured(folder):
    found = compare(Reference(folder, TINY), ROWS["QVGen"], "w3a16", 5)
    assert found["recipe"] == "qvgen-w3a16"
    assert [point["step"] for point in found["curve"]] == [10, 11]
    assert found["curve"][-1]["rank"] == 0
    assert all(np.isfinite(point["gradient_norm"]) for point in found["curve"])
    assert 0 < found["start"]["validation"] < 1
    assert 0 < found["result"]["validation"] < 1
    assert {"psnr", "color", "shape", "direction"} <= found["result"].keys()
    assert {"color", "shape", "direction"} <= found["full_precision"].keys()


def test_what_is_there_is_kept(tmp_path, monkeypatch, capsys):
    asked = []

    def one(reference, row, bits, seed):
        asked.append((row, bits, seed, reference.protocol.steps))
        return {"result": {"validation": 0.1}, "seconds": 1.0}

    monkeypatch.setattr(run, "compare", one)
    options = ["--rows", "LSQ", "Q-DM", "--seeds", "3,4", "--steps", "7", "--out", str(tmp_path / "out")]
    run.main(options)
    assert asked == [(ROWS[name], "w4a4", seed, 7) for seed in (3, 4) for name in ("LSQ", "Q-DM")]
    file_of(tmp_path / "out", "Q-DM", 3).unlink()
    run.main(options)
    assert asked[4:] == [(ROWS["Q-DM"], "w4a4", 3, 7)]
    facts = json.loads((tmp_path / "out" / "lsq-4.json").read_text())
    assert (facts["row"], facts["seed"], facts["protocol"]["steps"]) == ("LSQ", 4, 7)


def result(row, seed, validation, **more):
    scores = {"psnr": 20.0, "color": 1.0, "shape": 0.5, "direction": 0.9}
    curve = [{"step": 10, "loss": 1.0, "gradient_norm": 0.5, **more}]
    return {
        "row": row, "seed": seed, "recipe": "lsq-w4a4", "curve": curve, "seconds": 2.0, "device": "cpu", "jax": "1",
        "start": {"validation": 0.5}, "result": {"validation": validation, **scores},
        "protocol": dataclasses.asdict(Protocol()), "full_precision": {"color": 1.0, "shape": 0.9, "direction": 1.0},
    }  # fmt: skip


def fill(folder, *results):
    folder.mkdir()
    for one in results:
        file_of(folder, one["row"], one["seed"]).write_text(json.dumps(one))
    return folder


def test_the_page_says_what_held_and_what_did_not(tmp_path):
    folder = fill(
        tmp_path / "qat-wan-w4a4",
        result("QVGen", 0, 0.10, small_share=0.5), result("QVGen", 1, 0.14, small_share=0.5),
        result("LSQ", 0, 0.12), result("LSQ", 1, 0.13), result("Q-DM", 0, 0.11), result("QVGen, Phi kept", 0, 0.1199),
    )  # fmt: skip
    files = page.write(folder)
    assert [path.name for path in files] == ["README.md", "gradient-norms.png", "small-shares.png"]
    text = files[0].read_text()
    assert "0.12 (0.1 to 0.14) | 0.5 | 20.00 | 1.00 | 0.50 | 0.90 |" in text
    assert "| full precision (the teacher) | | 0 | | | 1.00 | 0.90 | 1.00 |" in text
    assert "- QVGen before LSQ: holds, -4.0 % of validation error, better in 1 of 2 seeds." in text
    assert "- QVGen before Q-DM: **does not hold**, +9.1 % of validation error, better in 1 of 1 seeds." in text
    assert "less than 1 % against keeping Phi: holds, +0.1 %." in text
    assert "EfficientDM" not in text.split("## What was expected")[1]
    assert "still to be run: straight-through (0 of 2), Q-DM (1 of 2), EfficientDM (0 of 2), QVGen, Phi kept" in text


def test_results_that_do_not_compare_are_refused(tmp_path):
    other = result("LSQ", 0, 0.1)
    other["protocol"]["steps"] = 9
    with pytest.raises(UserError, match="different protocols"):
        page.write(fill(tmp_path / "mixed", other, result("Q-DM", 0, 0.1)))
    with pytest.raises(UserError, match="no results"):
        page.write(fill(tmp_path / "empty"))
    assert page.main([str(tmp_path / "empty")]) == 2
