"""The job behind `qvdjax tabulate`: folders with tables sample as the folders they were made from."""

import json

import jax
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

import conversion
import models
import qvdjax
from experiments.calibrating import calibrate_folder
from experiments.evaluation import evaluate
from experiments.quantizing import quantize_folder
from experiments.sampling import sample_folder
from experiments.tabulating import tabulate_folder
from experiments.training import train_folder
from models.pipeline import Pipeline
from qvdjax.errors import UserError
from qvdjax.nn import tables_of
from qvdjax.parallel import make_mesh

WEIGHTS = "diffusion_pytorch_model.safetensors"
WORDS = ("a", "red", "blue", "disc", "moving", "left")
PIPELINE = small_models.pipeline(WORDS, 24, tokens=6)
# The same float32 operations over other batches: the argument is test_sampling's, for latents of size 7.
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float Wan folder with a pipeline of three steps of UniPC."""
    path = tmp_path_factory.mktemp("models") / "float"
    models.save(small_models.wan(in_channels=12, out_channels=12), path)
    PIPELINE.save(path)
    return path


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "w4a8"
    quantize_folder(folder, path, "rtn-w4a8")
    return path


@pytest.fixture(scope="module")
def tabulated(folder, tmp_path_factory):
    """(folder, report) with tables over the pipeline's own steps."""
    path = tmp_path_factory.mktemp("models") / "tabulated"
    return path, tabulate_folder(folder, path)


def latents(folder, out, **settings):
    report = sample_folder(folder, out, prompts=["a red disc"], seeds=[3], **settings)
    return load_file(report["files"][0])["latents"], report


def test_the_same_video_from_fewer_bytes(folder, tabulated, tmp_path):
    path, report = tabulated
    before, _ = latents(folder, tmp_path / "before.safetensors")
    after, record = latents(path, tmp_path / "after.safetensors")
    np.testing.assert_allclose(after, before, atol=ROUNDING)
    assert record["quantization"]["layers"] == {"w32a32": record["quantization"]["layers"]["w32a32"], "table": 3}

    tensors, plain = load_file(path / WEIGHTS), load_file(folder / WEIGHTS)
    gone = {key for key in plain if key not in tensors}
    names = [f"condition_embedder.{name}" for name in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj")]
    assert gone == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert [tensors[f"{name}.table"].shape for name in names] == [(3, 64), (3, 64), (3, 384)]
    sizes = [sum(tensor.nbytes for tensor in group.values()) for group in (plain, tensors)]
    assert (report["weight_bytes"]["before"], report["weight_bytes"]["after"]) == tuple(sizes)
    assert report["replaced_bytes"] == sum(plain[key].nbytes for key in gone)
    assert report["table_bytes"] == 3 * 4 * (64 + 64 + 384)
    assert sizes[1] < 0.9 * sizes[0]
    assert report["timesteps"] == [float(t) for t in PIPELINE.make_solver().schedule(3).timesteps]


def test_a_quantized_folder_keeps_its_other_layers(quantized, tmp_path):
    report = tabulate_folder(quantized, tmp_path / "tabulated")
    assert report["replaced_bytes"] > report["table_bytes"]
    before, after = (load_file(path / WEIGHTS) for path in (quantized, tmp_path / "tabulated"))
    for key in set(before) & set(after):
        np.testing.assert_array_equal(after[key], before[key])
    assert models.load(tmp_path / "tabulated").recipe_name == "rtn-w4a8"
    first, _ = latents(quantized, tmp_path / "before.safetensors")
    second, _ = latents(tmp_path / "tabulated", tmp_path / "after.safetensors")
    # Modulation differs in the last bit of float32, and now and then flips a code of 8 bits: a 254th of a token's
    # range in one of 64 summands. Over three blocks and steps less than a hundredth of the whole.
    assert np.linalg.norm(second - first) / np.linalg.norm(first) < 1e-2


def test_the_new_folder_is_sampled_with_its_own_steps(folder, tmp_path):
    settings = {"steps": 2, "solver": "euler", "shift": 5.0}
    report = tabulate_folder(folder, tmp_path / "euler", **settings)
    assert {name: report[name] for name in settings} == settings
    pipeline = Pipeline.load(tmp_path / "euler")
    assert (pipeline.solver, pipeline.steps, pipeline.shift, pipeline.guidance_scale) == ("euler", 2, 5.0, 4.0)
    before, _ = latents(folder, tmp_path / "before.safetensors", **settings)
    after, _ = latents(tmp_path / "euler", tmp_path / "after.safetensors")
    np.testing.assert_allclose(after, before, atol=ROUNDING)


def test_another_sampler_is_refused_before_a_weight_is_read(folder, tabulated, tmp_path):
    path, _ = tabulated
    calls = []
    said = "hold the 3 timesteps of unipc, steps 3, shift 3.0; this sampler visits others"
    with pytest.raises(UserError, match=said) as refusal:
        latents(path, tmp_path / "out.safetensors", steps=4, progress=lambda *call: calls.append(call))
    assert len(refusal.value.items) == 3  # all but the first, which is pure noise for both
    with pytest.raises(UserError, match=said):
        latents(path, tmp_path / "out.safetensors", shift=2.0)
    with pytest.raises(UserError, match=said):
        evaluate(folder, path, tmp_path / "report", prompts=["a red disc"], steps=4)
    assert not calls
    assert not list(tmp_path.iterdir())


def test_evaluate_finds_no_difference(folder, tabulated, tmp_path):
    metrics = evaluate(folder, tabulated[0], tmp_path / "report", prompts=["a red disc"])
    assert metrics["teacher_forced_error"]["mean"] < 1e-8  # float32 rounding, squared
    assert metrics["weight_bytes"]["ratio"] < 0.9


@pytest.mark.parametrize("mesh", [None, {"fsdp": 2, "tensor": 4}])
def test_a_folder_with_tables_is_read_as_it_was_written(tabulated, tmp_path, mesh):
    path, report = tabulated
    model = models.load(path, mesh=None if mesh is None else make_mesh(mesh))
    assert qvdjax.describe(model) == report["layers"] == qvdjax.describe(models.skeleton(path))
    spread = [not table.table[...].sharding.is_fully_replicated for table in tables_of(model)]
    assert all(spread) == any(spread) == (mesh is not None)
    models.save(model, tmp_path / "again")
    for file in ("config.json", WEIGHTS):
        assert (tmp_path / "again" / file).read_bytes() == (path / file).read_bytes()


def test_a_narrower_type_leaves_tables_as_they_are(tabulated):
    narrow = models.load(tabulated[0], dtype="bfloat16")
    assert {table.table[...].dtype.name for table in tables_of(narrow)} == {"float32"}
    inputs = {**small_models.wan_inputs(), "latents": jax.numpy.zeros((2, 3, 4, 4, 12))}
    inputs["timestep"] = jax.numpy.asarray(tabulated[1]["timesteps"][:2], jax.numpy.float32)
    prediction = narrow(**inputs)
    assert prediction.dtype == "bfloat16"
    assert np.isfinite(np.asarray(prediction, np.float32)).all()


def test_what_needs_the_weights_is_refused(tabulated, tmp_path):
    path, _ = tabulated
    for work, remedy in (
        (lambda: tabulate_folder(path, tmp_path / "out"), "tabulate the folder it was made from"),
        (lambda: quantize_folder(path, tmp_path / "out", "rtn-w4a4"), "quantize the model it was made from"),
        (lambda: calibrate_folder(path, tmp_path / "out", count=1), "calibrate the full-precision folder"),
        (lambda: train_folder(path, tmp_path / "out", "rtn-w4a4", tmp_path), "train the folder it was made from"),
        (lambda: conversion.export(path, tmp_path / "out", "diffusers"), "export the folder it was made from"),
        (lambda: conversion.export(path, tmp_path / "out", "compressed-tensors"), "export the folder it was made from"),
    ):
        with pytest.raises(UserError, match=f"tables over 3 steps.*{remedy}"):
            work()
    with pytest.raises(UserError, match="is quantized"):
        conversion.convert(path, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_samplers_and_targets_that_do_not_fit(folder, tmp_path):
    for settings, said in (
        ({"steps": 0}, "steps is 0"), ({"solver": "ddim"}, "'ddim' is for models"), ({"shift": -1.0}, "shift is -1"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            tabulate_folder(folder, tmp_path / "out", **settings)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="taken exists"):
        tabulate_folder(folder, tmp_path / "taken")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_damaged_table_is_refused(tabulated, tmp_path):
    path, _ = tabulated
    (tmp_path / "model").mkdir()
    save_file(load_file(path / WEIGHTS), tmp_path / "model" / WEIGHTS)
    config = json.loads((path / "config.json").read_text())
    schemes = config["quantization_config"]["qvdjax"]["schemes"]
    tables = [scheme for scheme in schemes if scheme["kind"] == "table"]
    assert len(tables) == 3  # one a size of what they replace
    layers = config["quantization_config"]["qvdjax"]["layers"]
    attention, layers["blocks.0.attn1.attention"] = layers["blocks.0.attn1.attention"], schemes.index(tables[0])
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="kind Attention cannot be tables"):
        models.load(tmp_path / "model")
    layers["blocks.0.attn1.attention"] = attention
    for edit, said in (
        (lambda scheme: scheme["timesteps"].pop(), "does not fit the model.*3 of the wrong shape"),
        (lambda scheme: scheme.update(timesteps=["soon"]), "cannot be understood"),
        (lambda scheme: scheme.pop("timesteps"), "cannot be understood"),
    ):
        for scheme in tables:
            edit(scheme)
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=said):
            models.load(tmp_path / "model")


def test_a_published_cogvideox_is_tabulated_for_its_own_sampler(tmp_path):
    """No pipeline: the family's DDIM, and its scheduler comes along where there is one."""
    folder, context = tmp_path / "transformer", tmp_path / "context.safetensors"
    models.save(small_models.cogvideox("2b"), folder)
    (folder / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "CogVideoXDDIMScheduler", "prediction_type": "v_prediction", "timestep_spacing": "trailing",
    }))  # fmt: skip
    report = tabulate_folder(folder, tmp_path / "tabulated", steps=2)
    assert (report["solver"], report["steps"], report["timesteps"]) == ("ddim", 2, [999.0, 499.0])
    assert report["tables"] == 3 + 2 * 3  # of the timestep and the last norm, and two a block
    embeddings = np.random.default_rng(1).standard_normal((2, 7, 24)).astype(np.float32)
    save_file({"context": embeddings[0], "negative_context": embeddings[1]}, context)
    settings = {"context_file": context, "seeds": [4], "steps": 2, "frames": 3, "height": 8, "width": 6}
    before, after = (
        load_file(sample_folder(path, tmp_path / "out.safetensors", **settings)["files"][0])["latents"]
        for path in (folder, tmp_path / "tabulated")
    )
    np.testing.assert_allclose(after, before, atol=ROUNDING)
    with pytest.raises(UserError, match="2 timesteps of ddim, steps 2"):
        sample_folder(tmp_path / "tabulated", tmp_path / "out.safetensors", **{**settings, "steps": 3})
