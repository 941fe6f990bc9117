"""convert, info, quantize and export from folder to folder, and what is said to folders not in order."""

import json
import math
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from qvdjax import recipes
from qvdjax.checkpoint import CheckpointFolder

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUANTIZED = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def quantized_folder(model_folder, tmp_path_factory):
    from experiments.quantizing import quantize_folder

    target = tmp_path_factory.mktemp("quantized") / "w4a4"
    quantize_folder(model_folder, target, "rtn-w4a4")
    return target


def refused(done, *names):
    """The answer is what bad input gets: exit code 2, one line that names things, no traceback."""
    assert done.code == 2, done.err
    assert done.err.count("\n") == 1
    assert done.err.startswith("qvdjax: ")
    assert "Traceback" not in done.err
    for name in names:
        assert str(name) in done.err
    if done.report is not None:
        assert set(done.report) == {"error", "remedy", "items"}
        assert done.report["remedy"]
    return True


def test_info_opens_the_folder_once(qvdjax, quantized_folder, monkeypatch):
    opened = []

    def count(path, open=CheckpointFolder.open):
        opened.append(path)
        return open(path)

    monkeypatch.setattr(CheckpointFolder, "open", count)
    done = qvdjax("info", quantized_folder, "--json")
    ratios = {row["path"]: row["sqnr_db"] for row in done.report["layers"]}
    assert ratios[QUANTIZED] > 0  # read from the folder
    assert len(opened) == 1


def test_info_of_a_full_precision_folder(qvdjax, model_folder):
    done = qvdjax("info", model_folder, "--json")
    assert (done.code, done.err) == (0, "")
    report = done.report
    tensors = load_file(model_folder / WEIGHTS)
    assert report["family"] == "wan"
    assert report["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert report["weight_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    fields = {"path", "role", "shape", "weight_bits", "activation_bits", "bytes", "sqnr_db", "reason"}
    assert all(fields <= set(row) for row in report["layers"])
    by_path = {row["path"]: row for row in report["layers"]}
    for key, tensor in tensors.items():
        if key.endswith(".weight") and tensor.ndim == 2:
            assert by_path[key.removesuffix(".weight")]["shape"] == list(tensor.shape)
    row = by_path[QUANTIZED]
    assert (row["role"], row["shape"], row["weight_bits"], row["sqnr_db"]) == ("query", [24, 24], 32, None)
    assert row["bytes"] == 4 * (24 * 24 + 24)


def test_info_of_a_quantized_folder(qvdjax, model_folder, quantized_folder):
    report = qvdjax("info", quantized_folder, "--json").report
    plain = qvdjax("info", model_folder, "--json").report
    assert report["parameters"] == plain["parameters"]
    assert report["weight_bytes"] < plain["weight_bytes"]
    row = next(row for row in report["layers"] if row["path"] == QUANTIZED)
    assert (row["weight_bits"], row["activation_bits"]) == (4, 4)
    # Codes at 4 bits, a float32 scale an output channel, a float32 bias.
    assert row["bytes"] == 24 * 24 // 2 + 4 * 24 + 4 * 24
    # Uniform weights at 15 levels: about 6 dB a bit; 15 and 30 leave room for the odd row.
    assert 15 < row["sqnr_db"] < 30
    assert row["reason"]


def test_info_for_people_names_every_layer(qvdjax, quantized_folder):
    done = qvdjax("info", quantized_folder)
    report = qvdjax("info", quantized_folder, "--json").report
    assert all(row["path"] in done.out and row["reason"] in done.out for row in report["layers"])
    assert f"{report['parameters']:,} parameters" in done.out


def test_convert_keeps_every_bit(qvdjax, model_folder, tmp_path):
    done = qvdjax("convert", model_folder, tmp_path / "copy", "--json")
    assert (done.code, done.report["family"]) == (0, "wan")
    before, after = load_file(model_folder / WEIGHTS), load_file(tmp_path / "copy" / WEIGHTS)
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key])
        assert before[key].dtype == after[key].dtype
    assert (tmp_path / "copy" / "pipeline.json").exists()


def test_convert_casts(qvdjax, model_folder, tmp_path):
    assert qvdjax("convert", model_folder, tmp_path / "half", "--dtype", "bfloat16").code == 0
    assert load_file(tmp_path / "half" / WEIGHTS)[f"{QUANTIZED}.weight"].dtype == ml_dtypes.bfloat16


def test_convert_keeps_float64(qvdjax, model_folder, tmp_path):
    source = tmp_path / "double"
    shutil.copytree(model_folder, source)
    tensors = {key: value.astype(np.float64) for key, value in load_file(model_folder / WEIGHTS).items()}
    save_file(tensors, source / WEIGHTS)
    assert qvdjax("convert", source, tmp_path / "copy").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "copy" / WEIGHTS).values()} == {np.dtype(np.float64)}


def test_a_dry_run_writes_nothing(qvdjax, model_folder, tmp_path):
    done = qvdjax("convert", model_folder, tmp_path / "copy", "--dry-run", "--json")
    assert (done.code, done.report["target"]) == (0, None)
    assert not os.listdir(tmp_path)


def test_quantize_writes_a_folder_that_samples(qvdjax, model_folder, tmp_path):
    done = qvdjax("quantize", model_folder, tmp_path / "out", "--recipe", "rtn-w8a8", "--json")
    assert done.code == 0, done.err
    assert done.report["recipe"] == "rtn-w8a8"
    assert 0 < done.report["quantized_layers"] < len(done.report["layers"])
    assert math.isclose(done.report["ratio"], done.report["weight_bytes"] / done.report["float_bytes"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]
    for name in ("pipeline.json", "word_table.safetensors"):
        assert (tmp_path / "out" / name).exists()


def test_set_overrides_an_option(qvdjax, model_folder, tmp_path):
    path = QUANTIZED.replace(".", r"\.")
    done = qvdjax("quantize", model_folder, tmp_path / "out", "-r", "rtn-w8a8", "--set", f"skip={path}", "--json")
    row = next(row for row in done.report["layers"] if row["path"] == QUANTIZED)
    assert (row["execution"], row["weight_bits"]) == ("float", 32)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (["-r", "nonsense"], ["nonsense", "rtn"]),
        (["-r", "rtn-w9a4"], ["rtn-w9a4"]),
        (["-r", "rtn-w4a4", "--set", "alpha=1"], ["alpha"]),
        (["-r", "rtn-w4a4", "--set", "group_size=x"], ["group_size", "x"]),
        (["-r", "rtn-w4a4", "--set", "skip=no\\.such\\.layer"], ["no\\.such\\.layer"]),
        (["-r", "rtn-w4a4", "--set", "skip=("], ["skip"]),
        (["-r", "smoothquant-w4a4", "--calibration", "/no/where"], ["/no/where"]),
    ],
)
def test_what_quantize_refuses(qvdjax, model_folder, tmp_path, options, names):
    assert refused(qvdjax("quantize", model_folder, tmp_path / "out", *options), *names)
    assert not os.listdir(tmp_path)


def test_a_quantized_folder_is_not_quantized_again(qvdjax, quantized_folder, tmp_path):
    assert refused(qvdjax("quantize", quantized_folder, tmp_path / "out", "-r", "rtn-w4a4"), "quantized")
    assert not os.listdir(tmp_path)


def test_a_target_that_is_taken(qvdjax, model_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep me")
    for command in (["quantize", model_folder, tmp_path / "out", "-r", "rtn-w4a4"],
                    ["convert", model_folder, tmp_path / "out"]):  # fmt: skip
        assert refused(qvdjax(*command), tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["mine.txt"]
        assert qvdjax(*command, "--overwrite").code == 0
        shutil.rmtree(tmp_path / "out")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("keep me")


def test_export_dequantizes_and_refuses_what_it_does_not_know(qvdjax, model_folder, quantized_folder, tmp_path):
    done = qvdjax("export", quantized_folder, tmp_path / "plain", "--format", "diffusers", "--json")
    assert (done.code, done.report["format"]) == (0, "diffusers")
    plain, before = load_file(tmp_path / "plain" / WEIGHTS), load_file(model_folder / WEIGHTS)
    assert plain.keys() == before.keys()
    weight, original = plain[f"{QUANTIZED}.weight"], before[f"{QUANTIZED}.weight"]
    # Rounding to 15 levels moves a weight by half a step at most, a fourteenth of the row's largest.
    assert (np.abs(weight - original) <= 1.001 * np.abs(original).max(axis=1, keepdims=True) / 14).all()
    assert (weight != original).any()
    refusal = qvdjax("export", quantized_folder, tmp_path / "other", "--format", "gguf")
    assert refused(refusal, "gguf", "compressed-tensors")
    assert os.listdir(tmp_path) == ["plain"]


def test_tabulate_writes_a_folder_that_info_explains(qvdjax, quantized_folder, tmp_path):
    done = qvdjax("tabulate", quantized_folder, tmp_path / "out")
    assert done.code == 0, done.err
    assert "3 layers are tables over 2 steps of unipc" in done.out
    euler = qvdjax("tabulate", quantized_folder, tmp_path / "euler", "--solver", "euler", "--steps", "5", "--json")
    assert (euler.report["solver"], euler.report["steps"], len(euler.report["timesteps"])) == ("euler", 5, 5)
    shown = qvdjax("info", tmp_path / "out")
    assert shown.out.count("a table over 2 steps, in the place of") == 3
    rows = {row["path"]: row for row in qvdjax("info", tmp_path / "out", "--json").report["layers"]}
    row = rows["condition_embedder.time_proj"]
    assert (row["shape"], row["bytes"], row["execution"]) == ([2, 144], 2 * 144 * 4, "table")
    plain = qvdjax("info", quantized_folder, "--json").report["layers"]
    assert row["replaced_bytes"] == next(r["bytes"] for r in plain if r["path"] == row["path"])


def test_tabulate_samples_and_refuses(qvdjax, model_folder, tmp_path):
    out = tmp_path / "out"
    assert qvdjax("tabulate", model_folder, out, "--steps", "3").code == 0
    done = qvdjax("sample", out, "-o", tmp_path / "clip.mp4")
    assert done.code == 0, done.err
    video = json.loads((tmp_path / "clip.json").read_text())
    pixels = f"{video['frames']} frames of {video['height']} x {video['width']}"
    assert f"{pixels}, {video['fps']:g} a second, from latents of " in done.out
    others = qvdjax("sample", out, "-o", tmp_path / "clip.mp4", "--steps", "4", "--json")
    assert refused(others, "hold the 3 timesteps of unipc, steps 3")
    assert len(others.report["items"]) == 3
    assert refused(qvdjax("tabulate", out, tmp_path / "again"), "tables over 3 steps")
    assert refused(qvdjax("export", out, tmp_path / "plain", "--format", "diffusers"), "tables over 3 steps")


def test_recipes_are_listed(qvdjax):
    done = qvdjax("recipes", "--json")
    assert [row["name"] for row in done.report["recipes"]] == recipes.names()
    needs = {row["name"]: row["needs_calibration"] for row in done.report["recipes"]}
    assert not needs["rtn-w4a4"]
    assert needs["smoothquant-w4a4"]
    options = {method["name"]: method["options"] for method in done.report["methods"]}
    assert options["smoothquant"]["alpha"] == 0.5
    text = qvdjax("recipes").out
    assert all(name in text for name in recipes.names())


# Each case breaks a copy of a good folder; the names are what the one line must say.


def truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    return [WEIGHTS]


def no_safetensors(folder):
    (folder / WEIGHTS).write_bytes(b"this is not a safetensors file at all")
    return [WEIGHTS]


def header_beyond_the_file(folder):
    (folder / WEIGHTS).write_bytes((2**40).to_bytes(8, "little") + b"{}")
    return [WEIGHTS]


def overlapping(folder):
    header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
              "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}  # fmt: skip
    text = json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    return [WEIGHTS]


def unknown_dtype(folder):
    text = json.dumps({"a": {"dtype": "F7", "shape": [2], "data_offsets": [0, 8]}}).encode()
    (folder / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    return [WEIGHTS, "F7"]


def edited(change):
    def act(folder):
        tensors = load_file(folder / WEIGHTS)
        names = change(tensors)
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, folder / WEIGHTS)
        return names

    return act


def missing_key(tensors):
    del tensors[f"{QUANTIZED}.weight"]
    return [f"{QUANTIZED}.weight"]


def extra_key(tensors):
    tensors["blocks.0.stranger.weight"] = np.zeros(3, np.float32)
    return ["blocks.0.stranger.weight"]


def transposed(tensors):
    key = "blocks.1.ffn.net.2.weight"
    tensors[key] = tensors[key].T
    return [key]


def nan(tensors):
    tensors[f"{QUANTIZED}.weight"][0, 0] = np.nan
    return [f"{QUANTIZED}.weight"]


def infinite(tensors):
    tensors["proj_out.weight"][1, 1] = -np.inf
    return ["proj_out.weight"]


def missing_shard(folder):
    (folder / WEIGHTS).unlink()
    index = {"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    return ["diffusion_pytorch_model-00001-of-00002.safetensors"]


def empty(folder):
    for path in folder.iterdir():
        path.unlink()
    return [folder.name]


def broken_config(folder):
    (folder / "config.json").write_text('{"_class_name": ')
    return ["config.json"]


def strange_architecture(folder):
    (folder / "config.json").write_text('{"_class_name": "SomethingElse"}')
    return ["SomethingElse"]


IN_THE_VALUES = {edited(nan): "nan", edited(infinite): "infinite"}
IN_THE_KEYS = {edited(change): change.__name__ for change in (missing_key, extra_key, transposed)}
ON_DISK = {
    damage: damage.__name__
    for damage in (truncated, no_safetensors, header_beyond_the_file, overlapping, unknown_dtype,
                   missing_shard, empty, broken_config, strange_architecture)
}  # fmt: skip
DAMAGES = IN_THE_VALUES | IN_THE_KEYS | ON_DISK
VERBS = ("info", "convert", "calibrate", "quantize", "export", "sample", "evaluate")
# info reads the headers alone, so it cannot see a bad value.
CASES = [(verb, damage) for verb in VERBS for damage in DAMAGES if verb != "info" or damage not in IN_THE_VALUES]


def options(verb, work, reference):
    """What each verb needs beside the folder it reads; all that it writes goes into `work`."""
    return {
        "info": [], "convert": [work / "out"], "quantize": [work / "out", "-r", "rtn-w4a4"],
        "calibrate": [work / "out", "-p", "a red disc moving left"], "sample": ["-o", work / "out.mp4"],
        "export": [work / "out", "--format", "diffusers"], "evaluate": [reference, "-o", work / "out"],
    }[verb]  # fmt: skip


@pytest.mark.parametrize(("verb", "damage"), CASES, ids=[f"{verb}-{DAMAGES[damage]}" for verb, damage in CASES])
def test_damaged_folders_are_refused(qvdjax, model_folder, tmp_path, damage, verb):
    source, work = tmp_path / "source", tmp_path / "work"
    shutil.copytree(model_folder, source)
    work.mkdir()
    names = damage(source)
    assert refused(qvdjax(verb, source, *options(verb, work, model_folder), "--json"), *names)
    assert not os.listdir(work)


@pytest.mark.parametrize("verb", VERBS)
def test_a_folder_that_is_not_there(qvdjax, model_folder, tmp_path, verb):
    missing = tmp_path / "nothing"
    assert refused(qvdjax(verb, missing, *options(verb, tmp_path, model_folder)), missing)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("place", ["/proc/out", "file/out"])
def test_targets_that_cannot_be_written(qvdjax, model_folder, tmp_path, place):
    (tmp_path / "file").write_text("a file where a folder should be")
    target = tmp_path / place  # an absolute place replaces tmp_path
    assert refused(qvdjax("convert", model_folder, target), target)
    assert refused(qvdjax("quantize", model_folder, target, "-r", "rtn-w4a4"), target)


def test_the_last_column_says_what_is_computed_online():
    from experiments.cli.verbs.folders import _why

    online = {"transforms": ["smooth_scale", "rotation"], "rotation_block": 64, "center_bits": 8, "rank": 8,
              "branch_bytes": 2048, "multiply_adds": 20, "share": 0.05}  # fmt: skip
    assert _why({"reason": "a product", "online": online}) == (
        "a product; online smooth_scale, rotation of 64 channels, mean of tokens at 8 bits, branch of rank 8, 2 KiB: "
        "5.0% of its multiply-adds"
    )
    assert _why({"reason": "a product", "online": None}) == "a product"


def test_a_motion_adapter_is_for_an_image_unet(qvdjax, model_folder, tmp_path):
    done = qvdjax("convert", model_folder, tmp_path / "out", "--motion-adapter", model_folder, "--json")
    assert refused(done, model_folder, "not a UNet2DConditionModel", "UNet of Stable Diffusion 1.5")
    assert not (tmp_path / "out").exists()
