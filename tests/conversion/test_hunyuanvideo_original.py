"""HunyuanVideo's original layout: the same tensors as diffusers' own converter makes, both ways, and refusals."""

import json
import os

import jax
import numpy as np
import pytest

import conversion
import models
from conversion import hunyuanvideo_original
from qvdjax.checkpoint import CheckpointFolder, TensorSource, expected_tensors, write_file
from qvdjax.errors import UserError

CONFIG = {
    "_class_name": "HunyuanVideoTransformer3DModel", "num_attention_heads": 1, "num_layers": 2, "num_single_layers": 3,
    "num_refiner_layers": 1, "mlp_ratio": 0.5, "in_channels": 3, "out_channels": 3, "text_embed_dim": 6,
    "pooled_projection_dim": 5,
}  # fmt: skip


@pytest.fixture(scope="module")
def values():
    """diffusers key -> random float32 weights of a small HunyuanVideo."""
    random = np.random.default_rng(0)
    expected = expected_tensors(models.abstract(CONFIG))
    return {key: random.standard_normal(tensor.shape).astype(np.float32) for key, tensor in expected.items()}


@pytest.fixture
def folder(tmp_path, values):
    """A diffusers folder of these weights."""
    write(tmp_path / "source" / "diffusion_pytorch_model.safetensors", values)
    (tmp_path / "source" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "source"


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, [TensorSource(key, v.shape, v.dtype, lambda v=v: v) for key, v in values.items()])
    return path


def content(path):
    opened = CheckpointFolder.open(path)
    return {key: opened.read(key) for key in opened.keys}


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@pytest.fixture
def original(tmp_path, folder):
    """The original tensors by name."""
    conversion.export(folder, tmp_path / "exported", "hunyuanvideo-original")
    return content(tmp_path / "exported")


def test_export_and_conversion_are_inverse(tmp_path, folder, values):
    report = conversion.export(folder, tmp_path / "original", "hunyuanvideo-original")
    stored = content(tmp_path / "original")
    assert stored["double_blocks.1.txt_attn_qkv.weight"].shape == (3 * 128, 128)
    assert stored["single_blocks.2.linear1.bias"].shape == (3 * 128 + 64,)
    assert report["tensors"] == len(stored) < len(values)
    stated = json.loads((tmp_path / "original" / "config.json").read_text())
    assert (stated["hidden_size"], stated["heads_num"], stated["rope_dim_list"]) == (128, 1, [16, 56, 56])
    back = conversion.convert(tmp_path / "original", tmp_path / "back")
    assert (back["layout"], back["family"]) == ("hunyuanvideo-original", "hunyuanvideo")
    assert back["source_bytes"] == back["bytes"] == report["bytes"]
    assert equal(content(tmp_path / "back"), values)
    assert models.parse_config(back["config"]) == models.parse_config(CONFIG)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_without_a_config(tmp_path, original, values, prefix):
    file = write(tmp_path / "comfy" / "video.safetensors", {prefix + key: v for key, v in original.items()})
    report = conversion.convert(file, tmp_path / "target")
    assert "shared out 16, 56, 56" in report["config_from"]
    assert models.parse_config(report["config"]) == models.parse_config(CONFIG)
    assert equal(content(tmp_path / "target"), values)
    models.load(tmp_path / "target")


def test_diffusers_names_without_a_config_are_enough(tmp_path, values):
    report = conversion.convert(write(tmp_path / "a.safetensors", values), tmp_path / "target")
    assert (report["layout"], report["family"]) == ("diffusers", "hunyuanvideo")
    assert equal(content(tmp_path / "target"), values)


def test_how_heads_are_shared_out_comes_from_the_original_config(tmp_path, folder):
    config = {**CONFIG, "rope_axes_dim": [32, 48, 48]}
    (folder / "config.json").write_text(json.dumps(config))
    conversion.export(folder, tmp_path / "original", "hunyuanvideo-original")
    report = conversion.convert(tmp_path / "original", tmp_path / "back")
    assert report["config"]["rope_axes_dim"] == [32, 48, 48]


def test_the_names_of_the_real_model_are_a_bijection():
    keys = expected_tensors(models.abstract({"_class_name": "HunyuanVideoTransformer3DModel"}))
    assert len(keys) == 1264  # counted in diffusers' own model
    of_original = {name: hunyuanvideo_original.to_original(name) for name in keys}
    assert None not in of_original.values()
    for key in set(of_original.values()):
        assert [name for name in hunyuanvideo_original.to_diffusers(key) if of_original[name] != key] == []
    assert hunyuanvideo_original.is_original(of_original.values())
    assert not hunyuanvideo_original.is_original(keys)


def test_diffusers_own_converter_makes_the_same():
    """With the released width, which diffusers' converter takes for granted."""
    torch = pytest.importorskip("torch")
    single_file_utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    config = {**CONFIG, "num_attention_heads": 24, "mlp_ratio": 0.01, "num_layers": 1, "num_single_layers": 1}
    random, shapes = np.random.default_rng(0), {}
    expected = {key: tensor.shape for key, tensor in expected_tensors(models.abstract(config)).items()}
    for name, shape in expected.items():
        key = hunyuanvideo_original.to_original(name)
        shapes[key] = (shapes.get(key, (0,))[0] + shape[0], *shape[1:])
    # One column is enough to see rows move.
    arrays = {key: random.standard_normal((shape[0], 1)).astype(np.float32) for key, shape in shapes.items()}
    theirs = single_file_utils.convert_hunyuan_video_transformer_to_diffusers(
        {key: torch.tensor(array) for key, array in arrays.items()}
    )
    places = hunyuanvideo_original.places({key: array.shape for key, array in arrays.items()})
    assert places.keys() == theirs.keys() == expected.keys()
    for name, place in places.items():
        ours = np.concatenate([arrays[place.key][slice(*rows)] for rows in place.rows])
        assert len(ours) == expected[name][0], name
        assert np.array_equal(ours, theirs[name].numpy()), name


def refused(source, tmp_path, match):
    with pytest.raises(UserError, match=match) as error:
        conversion.convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
    return error.value


def test_strangers_and_doubles_are_refused(tmp_path, original):
    bias = original["final_layer.linear.bias"]
    file = write(tmp_path / "a.safetensors", {**original, "img_in.wings.weight": bias})
    error = refused(file, tmp_path, "HunyuanVideo's original layout does not have")
    assert error.items == ("img_in.wings.weight",)
    file = write(tmp_path / "b.safetensors", {**original, "diffusion_model.final_layer.linear.bias": bias})
    refused(file, tmp_path, "holds keys twice")


def test_image_to_video_is_refused(tmp_path, original):
    wide = np.concatenate([original["img_in.proj.weight"]] * 2, axis=1)
    file = write(tmp_path / "a.safetensors", {**original, "img_in.proj.weight": wide})
    refused(file, tmp_path, "6 channels and returns 3: it is image-to-video")


@pytest.mark.parametrize("key", ["double_blocks.0.img_attn_qkv.weight", "single_blocks.0.linear1.weight"])
def test_fused_layers_of_other_widths_are_refused(tmp_path, original, key):
    file = write(tmp_path / "a.safetensors", {**original, key: original[key][: 3 * 128 - 1]})
    refused(file, tmp_path, f"{key} has 383 rows")


def test_missing_tensors_are_refused(tmp_path, original):
    for key, match in (
        ("double_blocks.0.img_attn_q_norm.weight", "transformer_blocks.0.attn.norm_q.weight is missing"),
        ("single_blocks.1.linear2.bias", "1 missing"),
    ):
        file = write(tmp_path / "a.safetensors", {name: v for name, v in original.items() if name != key})
        refused(file, tmp_path, match)


def test_a_config_that_contradicts_the_weights_is_refused(tmp_path, original):
    write(tmp_path / "stated" / "a.safetensors", original)
    (tmp_path / "stated" / "config.json").write_text('{"heads_num": 2, "mm_double_blocks_depth": 2}')
    assert refused(tmp_path / "stated", tmp_path, "contradicts").items == ("heads_num 2, 1 by shape",)
    (tmp_path / "stated" / "config.json").write_text('{"rope_dim_list": [8, 8, 8]}')
    refused(tmp_path / "stated", tmp_path, "does not share out the 128 features")


def test_what_the_original_layout_cannot_say_is_not_exported(tmp_path, folder):
    (folder / "config.json").write_text(json.dumps({**CONFIG, "rope_theta": 100.0}))
    with pytest.raises(UserError, match="rope_theta 100.0 has no place"):
        conversion.export(folder, tmp_path / "original", "hunyuanvideo-original")
    with pytest.raises(UserError, match="only Wan models"):
        conversion.export(folder, tmp_path / "original", "wan-original")


def test_the_model_that_comes_back_computes_the_same(tmp_path, folder, original):
    conversion.convert(write(tmp_path / "a.safetensors", original), tmp_path / "target")
    one, other = models.load(folder), models.load(tmp_path / "target")
    assert all(map(np.array_equal, jax.tree.leaves(one), jax.tree.leaves(other)))
