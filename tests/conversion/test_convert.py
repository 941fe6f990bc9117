"""Conversion of small Wan checkpoints in every layout, and what is refused."""

import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import conversion
import models
from conversion import wan_original
from models.scheduler import sampling_defaults
from qvdjax.checkpoint import (
    CheckpointFolder,
    SafetensorsFile,
    TensorSource,
    expected_tensors,
    write_file,
    write_folder,
)
from qvdjax.checkpoint.folder import WEIGHTS
from qvdjax.diffusion import FlowMatchEuler
from qvdjax.errors import UserError

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 1,
    "attention_head_dim": 128,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 2,
}
ORIGINAL_CONFIG = {"_class_name": "WanModel", "dim": 128, "num_heads": 1, "num_layers": 2, "eps": 1e-6}


def sources(values):
    return [TensorSource(key, value.shape, value.dtype, lambda v=value: v) for key, value in values.items()]


@pytest.fixture(scope="module")
def values():
    """diffusers key -> random float32 weights of a small Wan."""
    rng = np.random.default_rng(0)
    expected = expected_tensors(models.abstract(CONFIG))
    return {key: rng.standard_normal(tensor.shape).astype(np.float32) for key, tensor in expected.items()}


@pytest.fixture
def diffusers_folder(tmp_path, values):
    write_folder(tmp_path / "source", CONFIG, sources(values))
    return tmp_path / "source"


def original_file(path, values, prefix=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, sources({prefix + wan_original.to_original(key): v for key, v in values.items()}))
    return path


def holds(path, values):
    """Whether a folder holds exactly these tensors, bit for bit."""
    folder = CheckpointFolder.open(path)
    content = lambda v: (v.dtype, v.shape, v.tobytes())  # noqa: E731
    return {k: content(folder.read(k)) for k in folder.keys} == {k: content(v) for k, v in values.items()}


def rewrite(path, change):
    file = SafetensorsFile(path / WEIGHTS)
    values = {name: file.read(name) for name in file.tensors}
    write_file(path / WEIGHTS, sources(change(values) or values))


def test_a_diffusers_folder_comes_out_as_it_went_in(tmp_path, diffusers_folder, values):
    (diffusers_folder / "pipeline.json").write_text("{}")
    report = conversion.convert(diffusers_folder, tmp_path / "target")
    assert holds(tmp_path / "target", values)
    assert json.loads((tmp_path / "target" / "config.json").read_text()) == CONFIG
    assert (tmp_path / "target" / "pipeline.json").read_text() == "{}"
    size = sum(v.nbytes for v in values.values())
    assert (report["family"], report["layout"], report["renamed"]) == ("wan", "diffusers", 0)
    assert (report["tensors"], report["bytes"], report["source_bytes"]) == (len(values), size, size)
    assert report["parameters"] == sum(v.size for v in values.values())
    assert report["side_files"] == ["pipeline.json"]
    json.dumps(report)


@pytest.mark.parametrize("inner", ["transformer", "unet"])
def test_the_model_inside_a_pipeline_folder_is_taken(tmp_path, values, inner):
    write_folder(tmp_path / "pipeline" / inner, CONFIG, sources(values))
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    conversion.convert(tmp_path / "pipeline", tmp_path / "target")
    assert holds(tmp_path / "target", values)


def test_the_scheduler_of_a_pipeline_folder_is_taken_along(tmp_path, values):
    write_folder(tmp_path / "repository" / "transformer", CONFIG, sources(values))
    scheduler = tmp_path / "repository" / "scheduler" / "scheduler_config.json"
    scheduler.parent.mkdir()
    scheduler.write_text('{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 9.0}')
    report = conversion.convert(tmp_path / "repository", tmp_path / "target")
    assert report["side_files"] == ["scheduler_config.json"]
    assert sampling_defaults(tmp_path / "target").solver == FlowMatchEuler(9.0)


def test_a_pipeline_with_two_experts_asks_for_one(tmp_path, values):
    for name in ("transformer", "transformer_2"):
        write_folder(tmp_path / "pipeline" / name, CONFIG, sources(values))
    with pytest.raises(UserError, match="several models"):
        conversion.convert(tmp_path / "pipeline", tmp_path / "target")
    conversion.convert(tmp_path / "pipeline" / "transformer_2", tmp_path / "target")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_single_file_with_original_names_and_no_config(tmp_path, values, prefix):
    path = original_file(tmp_path / "comfy" / "wan.safetensors", values, prefix)
    report = conversion.convert(path, tmp_path / "target")
    assert holds(tmp_path / "target", values)
    assert report["layout"] == "wan-original"
    assert "128 features" in report["config_from"]
    assert models.parse_config(report["config"]) == models.parse_config(CONFIG)
    conversion.convert(path.parent, tmp_path / "again")  # the folder that holds it
    assert holds(tmp_path / "again", values)


def test_the_original_repository_with_its_own_config(tmp_path, values):
    """Four heads of 32, which shapes do not tell."""
    folder = original_file(tmp_path / "wan" / WEIGHTS, values).parent
    (folder / "config.json").write_text(json.dumps(ORIGINAL_CONFIG | {"num_heads": 4}))
    report = conversion.convert(folder, tmp_path / "target")
    assert (report["config"]["num_attention_heads"], report["config"]["attention_head_dim"]) == (4, 32)
    assert holds(tmp_path / "target", values)
    models.load(tmp_path / "target")


def test_original_shards_with_an_index(tmp_path, values):
    names = {wan_original.to_original(key): value for key, value in values.items()}
    write_folder(tmp_path / "wan", ORIGINAL_CONFIG, sources(names), max_shard_bytes=100_000)
    assert len(list((tmp_path / "wan").glob("*.safetensors"))) > 2
    conversion.convert(tmp_path / "wan", tmp_path / "target")
    assert holds(tmp_path / "target", values)


def test_what_was_converted_runs(tmp_path, values):
    original_file(tmp_path / "wan.safetensors", values)
    conversion.convert(tmp_path / "wan.safetensors", tmp_path / "target")
    model = models.load(tmp_path / "target")
    out = model(jnp.ones((1, 2, 4, 4, 4)), jnp.ones((1,)), jnp.ones((1, 3, 8)))
    assert out.shape == (1, 2, 4, 4, 4)
    assert bool(jnp.isfinite(out).all())
    np.testing.assert_array_equal(model.proj_out.weight[...], values["proj_out.weight"])


@pytest.mark.parametrize("kind", [np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_types_of_the_source_are_kept_by_default(tmp_path, values, kind):
    mixed = {key: v.astype(kind) if v.ndim > 1 else v for key, v in values.items()}
    original_file(tmp_path / "wan.safetensors", mixed)
    report = conversion.convert(tmp_path / "wan.safetensors", tmp_path / "target")
    assert holds(tmp_path / "target", mixed)
    assert set(report["dtypes"]) == {str(np.dtype(kind)), "float32"}


@pytest.mark.parametrize("name", ["bfloat16", "BF16", "float16"])
def test_a_wanted_type_leaves_the_float32_islands(tmp_path, diffusers_folder, values, name):
    conversion.convert(diffusers_folder, tmp_path / "target", dtype=name)
    folder = CheckpointFolder.open(tmp_path / "target")
    narrow = np.dtype({"BF16": "bfloat16"}.get(name, name))
    for key, value in values.items():
        # What diffusers keeps too (`_keep_in_fp32_modules` of its Wan).
        island = any(part in key for part in ("scale_shift_table", "time_embedder", ".norm2."))
        dtype = np.dtype(np.float32) if island else narrow
        assert folder.info(key).dtype == dtype, key
        assert folder.read(key).tobytes() == value.astype(dtype).tobytes()


def test_a_dry_run_writes_nothing_and_reports_the_same(tmp_path, diffusers_folder):
    before = sorted(os.listdir(tmp_path))
    dry = conversion.convert(diffusers_folder, tmp_path / "target", dtype="bfloat16", dry_run=True)
    assert sorted(os.listdir(tmp_path)) == before
    real = conversion.convert(diffusers_folder, tmp_path / "target", dtype="bfloat16")
    assert dry | {"target": real["target"]} == real


# --- refusals: nothing may be left under the target's name


def refused(source, tmp_path, match, **options):
    with pytest.raises(UserError, match=match) as error:
        conversion.convert(source, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    return error.value


def test_extra_missing_and_transposed_keys_are_refused_together(tmp_path, diffusers_folder):
    def change(values):
        values["stranger"] = np.zeros(3, np.float32)
        values["blocks.1.ffn.net.2.weight"] = values["blocks.1.ffn.net.2.weight"].T.copy()
        return {key: value for key, value in values.items() if key != "proj_out.bias"}

    rewrite(diffusers_folder, change)
    error = refused(diffusers_folder, tmp_path, "1 missing, 1 unknown, 1 of the wrong shape")
    assert set(error.items) == {
        "proj_out.bias (missing)",
        "stranger (unknown)",
        "blocks.1.ffn.net.2.weight (shape [24, 128] instead of [128, 24], it appears to be transposed)",
    }


def test_a_dry_run_refuses_too(tmp_path, diffusers_folder):
    rewrite(diffusers_folder, lambda values: values.update(stranger=np.zeros(3, np.float32)))
    refused(diffusers_folder, tmp_path, "1 unknown", dry_run=True)


def test_original_files_with_strangers_are_refused(tmp_path, values):
    original_file(tmp_path / "wan.safetensors", values | {"proj_out.weight": values["proj_out.weight"]})
    file = SafetensorsFile(tmp_path / "wan.safetensors")
    content = {name: file.read(name) for name in file.tensors} | {"vae.conv.weight": np.zeros(2, np.float32)}
    write_file(tmp_path / "wan.safetensors", sources(content))
    error = refused(tmp_path / "wan.safetensors", tmp_path, "original layout does not have")
    assert error.items == ("vae.conv.weight",)


def test_the_same_key_with_and_without_prefix_is_refused(tmp_path, values):
    names = {wan_original.to_original(key): value for key, value in values.items()}
    names["model.diffusion_model.head.head.bias"] = names["head.head.bias"]
    write_file(tmp_path / "wan.safetensors", sources(names))
    refused(tmp_path / "wan.safetensors", tmp_path, "holds keys twice")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_and_leave_nothing(tmp_path, diffusers_folder, bad):
    def change(values):
        values["blocks.0.ffn.net.2.bias"][3] = bad
        values["proj_out.weight"][0, 0] = bad

    rewrite(diffusers_folder, change)
    error = refused(diffusers_folder, tmp_path, "NaN or infinite")
    assert set(error.items) == {"blocks.0.ffn.net.2.bias", "proj_out.weight"}


def test_weights_that_overflow_are_refused(tmp_path, diffusers_folder):
    rewrite(diffusers_folder, lambda values: values["proj_out.weight"].fill(1e6))
    refused(diffusers_folder, tmp_path, "overflows float16", dtype="float16")


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt"])
def test_pickles_are_refused_with_a_remedy(tmp_path, name):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / name).write_bytes(b"\x80\x02}q\x00.")
    for source in (folder, folder / name):
        error = refused(source, tmp_path, "pickles.*safetensors.torch.save_file")
        assert error.items == (name,)


def test_nothing_to_convert_is_refused(tmp_path, values):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "is empty")
    refused(tmp_path / "none", tmp_path, "does not exist")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "README.md").write_text("x")
    refused(tmp_path / "text", tmp_path, "holds no safetensors files")
    for name in ("a", "b"):
        original_file(tmp_path / "two" / f"{name}.safetensors", values)
    assert refused(tmp_path / "two", tmp_path, "without an index").items == ("a.safetensors", "b.safetensors")


def test_diffusers_names_without_a_config_of_another_family_are_refused(tmp_path):
    write_file(tmp_path / "a.safetensors", sources({"down_blocks.0.weight": np.zeros((2, 2), np.float32)}))
    refused(tmp_path / "a.safetensors", tmp_path, r"holds no config\.json")


def test_an_unknown_architecture_and_a_quantized_source_are_refused(tmp_path, values):
    write_folder(tmp_path / "other", CONFIG | {"_class_name": "LatteTransformer3DModel"}, sources(values))
    refused(tmp_path / "other", tmp_path, "LatteTransformer3DModel")
    write_folder(tmp_path / "quantized", CONFIG | {"quantization_config": {}}, sources(values))
    refused(tmp_path / "quantized", tmp_path, "is quantized; .*export")


def test_targets_and_types_that_will_not_do_are_refused(tmp_path, diffusers_folder, values):
    refused(diffusers_folder, tmp_path, "no floating type", dtype="int8")
    with pytest.raises(UserError, match="not empty"):
        conversion.convert(diffusers_folder, diffusers_folder)
    assert holds(diffusers_folder, values)
    with pytest.raises(UserError, match="cannot be written"):
        conversion.convert(diffusers_folder, diffusers_folder / "config.json" / "target")


def test_a_truncated_source_is_refused(tmp_path, diffusers_folder):
    content = (diffusers_folder / WEIGHTS).read_bytes()
    (diffusers_folder / WEIGHTS).write_bytes(content[:-1])
    refused(diffusers_folder, tmp_path, "truncated")
