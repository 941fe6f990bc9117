"""An image UNet and a motion adapter become one video UNet, the one that diffusers makes of them."""

import json
import shutil

import numpy as np
import pytest

import conversion
import models
from conversion.source import open_source
from models.scheduler import PUBLISHED, SCHEDULER, sampling_defaults
from qvdjax.checkpoint import CheckpointFolder
from qvdjax.errors import UserError

WIDTHS = (16, 32)


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet(diffusers):
    """A small UNet2DConditionModel, in what Stable Diffusion 1.5 has kinds of blocks."""
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=WIDTHS, layers_per_block=1, norm_num_groups=4, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def make_adapter(diffusers, **fields):
    usual = {
        "block_out_channels": WIDTHS, "motion_layers_per_block": 1, "motion_norm_num_groups": 4,
        "motion_num_attention_heads": 4, "motion_max_seq_length": 24, "use_motion_mid_block": False,
    }  # fmt: skip
    return diffusers.MotionAdapter(**{**usual, **fields})


@pytest.fixture(scope="module")
def saved(diffusers, unet, tmp_path_factory):
    """Folders: a pipeline of images (`unet` and its scheduler in it), and adapters as v1 and v2 have them."""
    folder = tmp_path_factory.mktemp("adapters")
    unet.save_pretrained(folder / "images" / "unet")
    diffusers.PNDMScheduler().save_pretrained(folder / "images" / "scheduler")
    make_adapter(diffusers).save_pretrained(folder / "v1")
    v2 = {"use_motion_mid_block": True, "motion_max_seq_length": 32}
    make_adapter(diffusers, **v2).save_pretrained(folder / "v2")
    return folder


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_merged_model_is_that_of_diffusers(diffusers, unet, saved, tmp_path, version):
    report = conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=saved / version)
    theirs = diffusers.UNetMotionModel.from_unet2d(unet, diffusers.MotionAdapter.from_pretrained(saved / version))
    folder, weights = CheckpointFolder.open(tmp_path / "merged"), theirs.state_dict()
    assert set(folder.keys) == weights.keys()
    assert all((folder.read(key) == weights[key].numpy()).all() for key in weights)
    # All that diffusers' own folder says, and nothing that it does not.
    theirs.save_pretrained(tmp_path / "theirs")
    ours, expected = (
        models.parse_config(CheckpointFolder.open(tmp_path / name).config) for name in ("merged", "theirs")
    )
    assert ours == expected
    assert (report["family"], report["layout"]) == ("animatediff", "image UNet and motion adapter")
    assert report["tensors"] == len(weights)
    # The image model's scheduler stays behind: the motion modules' own is the family's.
    assert report["side_files"] == []
    assert sampling_defaults(tmp_path / "merged") == PUBLISHED["animatediff"]
    # diffusers reads it back, and converting again changes nothing.
    back = diffusers.UNetMotionModel.from_pretrained(tmp_path / "merged")
    assert all((back.state_dict()[key] == tensor).all() for key, tensor in weights.items())
    conversion.convert(tmp_path / "merged", tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_a_video_unets_own_folder_and_scheduler(diffusers, saved, tmp_path):
    folder = tmp_path / "pipeline"
    adapter = diffusers.MotionAdapter.from_pretrained(saved / "v1")
    image = diffusers.UNet2DConditionModel.from_pretrained(saved / "images" / "unet")
    diffusers.UNetMotionModel.from_unet2d(image, adapter).save_pretrained(folder / "unet")
    settings = {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "timestep_spacing": "linspace"}
    diffusers.DDIMScheduler(**settings).save_pretrained(folder / "scheduler")
    report = conversion.convert(folder, tmp_path / "model")
    assert report["side_files"] == [SCHEDULER]
    solver = sampling_defaults(tmp_path / "model").solver
    assert (solver.timestep_spacing, solver.snr_shift_scale, solver.beta_schedule) == ("linspace", 1.0, "linear")


@pytest.mark.parametrize(("fields", "named"), [
    ({"block_out_channels": (32, 32)}, r"for another UNet: its block_out_channels is \[32, 32\].*\[16, 32\]"),
    ({"block_out_channels": (16, 32, 32)}, "for another UNet: its block_out_channels"),
    ({"motion_layers_per_block": 2}, "its motion_layers_per_block is 2, the UNet's layers_per_block 1"),
    ({"motion_norm_num_groups": 8}, "its motion_norm_num_groups is 8"),
    ({"motion_mid_block_layers_per_block": 2}, "motion_mid_block_layers_per_block 2"),
    ({"conv_in_channels": 9}, "conv_in of 9 channels"),
    ({"motion_transformer_layers_per_block": 2}, "temporal_transformer_layers_per_block 2 is not supported"),
])  # fmt: skip
def test_adapters_that_do_not_fit(saved, tmp_path, fields, named):
    config = tmp_path / "adapter" / "config.json"
    shutil.copytree(saved / "v1", tmp_path / "adapter")
    config.write_text(json.dumps({**json.loads(config.read_text()), **fields}))
    with pytest.raises(UserError, match=named):
        conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=tmp_path / "adapter")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(("version", "says", "named"), [
    ("v1", True, "weights hold none.*v1 and v3 have none"),
    ("v2", False, "weights hold a motion module for the middle"),
])  # fmt: skip
def test_configuration_and_weights_must_agree_about_the_middle(saved, tmp_path, version, says, named):
    config = tmp_path / "adapter" / "config.json"
    shutil.copytree(saved / version, tmp_path / "adapter")
    config.write_text(json.dumps({**json.loads(config.read_text()), "use_motion_mid_block": says}))
    with pytest.raises(UserError, match=named):
        conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=tmp_path / "adapter")


@pytest.mark.parametrize(("change", "named"), [
    ({"only_cross_attention": True}, "only_cross_attention True"),
    ({"class_embed_type": "timestep"}, "class_embed_type 'timestep'"),
    ({"down_block_types": "DownBlock2D"}, "no list down_block_types"),
    ({"attention_head_dim": [2, 4]}, r"num_attention_heads is \[2, 4\]"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'"),
])  # fmt: skip
def test_image_models_that_are_no_stable_diffusion(saved, tmp_path, change, named):
    shutil.copytree(saved / "images" / "unet", tmp_path / "unet")
    config = tmp_path / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=named):
        conversion.convert(tmp_path / "unet", tmp_path / "merged", motion_adapter=saved / "v1")


def test_parts_and_wholes_are_told_apart(saved, tmp_path):
    with pytest.raises(UserError, match="UNet of images.*--motion-adapter"):
        conversion.convert(saved / "images", tmp_path / "merged")
    with pytest.raises(UserError, match="motion modules alone"):
        conversion.convert(saved / "v1", tmp_path / "merged")
    with pytest.raises(UserError, match="not a UNet2DConditionModel"):
        conversion.convert(saved / "v1", tmp_path / "merged", motion_adapter=saved / "v1")
    with pytest.raises(UserError, match="not a MotionAdapter.*--motion-adapter"):
        conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=saved / "images")


def test_damaged_weights_of_an_adapter_are_named(saved, tmp_path):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(saved / "v1", tmp_path / "adapter")
    (weights,) = (tmp_path / "adapter").glob("*.safetensors")
    tensors = load_file(weights)
    key = "down_blocks.1.motion_modules.0.proj_in.weight"
    save_file({**tensors, key: np.full_like(tensors[key], np.nan)}, weights)
    with pytest.raises(UserError, match=key):
        conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=tmp_path / "adapter")
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, weights)
    with pytest.raises(UserError, match=rf"{key} \(missing\)"):
        conversion.convert(saved / "images", tmp_path / "merged", motion_adapter=tmp_path / "adapter", dry_run=True)
    assert set(open_source(tmp_path / "adapter").tensors) == set(tensors) - {key}
