"""ModelScope's and Stable Video Diffusion's folders through the program: convert, info, quantize, tabulate, sample."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file
from small_models import unet_3d, unet_spatio_temporal

import models
from experiments.moving_shapes import captions
from qvdjax.diffusion import EulerEDM, initial_noise, sample

ONE_LEVEL = {"block_out_channels": [16], "down_block_types": ["DownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D"]}
SVD_ONE_LEVEL = {
    "block_out_channels": [32], "down_block_types": ["DownBlockSpatioTemporal"], "num_attention_heads": [2],
    "up_block_types": ["CrossAttnUpBlockSpatioTemporal"],
}  # fmt: skip
RANDOM = np.random.default_rng(0)


def drawn(*shape):
    return RANDOM.standard_normal(shape).astype(np.float32)


def published(tmp_path, model, scheduler):
    """A pipeline's folder as diffusers has it: `unet`, and its `scheduler` beside it."""
    models.save(model, tmp_path / "pipeline" / "unet")
    (tmp_path / "pipeline" / "scheduler").mkdir()
    (tmp_path / "pipeline" / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    (tmp_path / "pipeline" / "model_index.json").write_text("{}")
    return tmp_path / "pipeline"


@pytest.mark.slow
def test_modelscope(qvdjax, tmp_path):
    scheduler = {
        "_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1,
    }  # fmt: skip
    folder = published(tmp_path, unet_3d(**ONE_LEVEL), scheduler)
    assert qvdjax("convert", folder, tmp_path / "model").code == 0
    info = qvdjax("info", tmp_path / "model", "--json").report
    assert info["family"] == "modelscope"
    roles = {row["path"]: row["role"] for row in info["layers"]}
    assert roles["transformer_in.proj_in"] == "projection"
    assert roles["up_blocks.0.resnets.1.time_emb_proj"] == "temporal_feature"
    assert roles["down_blocks.0.temp_convs.0.conv4.3"] == "convolution"
    done = qvdjax("quantize", tmp_path / "model", tmp_path / "w8a8", "--recipe", "rtn-w8a8")
    assert done.code == 0, done.err
    save_file({"context": drawn(7, 24), "negative_context": drawn(7, 24)}, tmp_path / "texts.safetensors")
    done = qvdjax(
        "sample", tmp_path / "w8a8", "-o", tmp_path / "out.safetensors", "--context", tmp_path / "texts.safetensors",
        "--steps", "2", "--frames", "3", "--height", "4", "--width", "6", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    expected = {"solver": "ddim", "beta_schedule": "scaled_linear", "set_alpha_to_one": False, "guidance_scale": 9.0}
    assert {name: done.report[name] for name in expected} == expected
    latents = load_file(tmp_path / "out.safetensors")["latents"]
    assert latents.shape == (3, 4, 6, 5)
    assert np.isfinite(latents).all()


SVD_SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction", "timestep_type": "continuous",
    "timestep_spacing": "leading", "use_karras_sigmas": True, "sigma_min": 0.002, "sigma_max": 700.0,
    "beta_schedule": "scaled_linear", "steps_offset": 1,
}  # fmt: skip


@pytest.mark.slow
def test_stable_video_diffusion(qvdjax, tmp_path):
    folder = published(tmp_path, unet_spatio_temporal(**SVD_ONE_LEVEL), SVD_SCHEDULER)
    assert qvdjax("convert", folder, tmp_path / "model").code == 0
    assert qvdjax("info", tmp_path / "model", "--json").report["family"] == "stable-video-diffusion"
    image, ids, context = drawn(4, 6, 3), np.array([6, 127, 0.02], np.float32), drawn(1, 24)
    file = tmp_path / "image.safetensors"
    save_file({"context": context, "image_latents": image, "added_time_ids": ids}, file)
    given = ("--context", file, "--steps", "2", "--json")
    done = qvdjax("sample", tmp_path / "model", "-o", tmp_path / "out.safetensors", *given)
    assert done.code == 0, done.err
    expected = {"solver": "euler-edm", "sigma_max": 700.0, "guidance_scale": 3.0, "first_frame_guidance": 1.0}
    assert {name: done.report[name] for name in expected} == expected
    one_image = jnp.asarray(image)[None, None]  # h w c -> 1 1 h w c
    want = sample(
        models.load(tmp_path / "model"), jnp.asarray(context)[None], jnp.zeros((1, 1, 24)), solver=EulerEDM(), steps=2,
        noise=initial_noise([0], (3, 4, 6, 5)), guidance_scale=3.0, first_frame_guidance=1.0, image_latents=one_image,
        negative_image_latents=0 * one_image, added_time_ids=jnp.asarray(ids)[None],
    )  # fmt: skip
    # The same program; where the constants come from may change how it is fused: float32 rounding.
    np.testing.assert_allclose(load_file(tmp_path / "out.safetensors")["latents"], want.latents[0], atol=1e-4)

    # A recipe that needs calibration is given the image's file; the set holds both passes.
    done = qvdjax(
        "calibrate", tmp_path / "model", tmp_path / "set", "--context", file, "--steps", "2", "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    done = qvdjax(
        "quantize", tmp_path / "model", tmp_path / "w8a8", "--recipe", "minmax-w8a8", "--calibration", tmp_path / "set"
    )
    assert done.code == 0, done.err
    done = qvdjax("sample", tmp_path / "w8a8", "-o", tmp_path / "quantized.safetensors", *given)
    assert done.code == 0, done.err
    quantized = load_file(tmp_path / "quantized.safetensors")["latents"]
    # Eight bits, two steps: some percent.
    assert 1e-4 < np.linalg.norm(quantized - want.latents[0]) / np.linalg.norm(want.latents[0]) < 0.3


@pytest.mark.slow
def test_rounding_of_a_unet_is_learned_by_one_command(qvdjax, tmp_path):
    one_level = {
        "block_out_channels": [16], "down_block_types": ["DownBlockMotion"], "up_block_types": ["UpBlockMotion"],
    }  # fmt: skip
    model = small_models.unet(in_channels=12, out_channels=12, **one_level)
    models.save(model, tmp_path / "model")
    small_models.pipeline(captions.WORDS, 24, steps=3, solver="ddim", shift=None).save(tmp_path / "model")
    command = ["quantize", tmp_path / "model", tmp_path / "out", "-r", "tfmq-dm-w4a8", "--set", "samples=2"]
    done = qvdjax(*command, "--set", "iterations=4", "--json")
    assert done.code == 0, done.err
    blocks = [block["name"] for block in done.report["reconstruction"]["blocks"]]
    assert blocks == ["temporal_features", "down_blocks.0", "mid_block", "up_blocks.0.0", "up_blocks.0.1"]
    reasons = {row["path"]: row["reason"] for row in done.report["layers"]}
    assert "each of 3 timesteps has a range" in reasons["up_blocks.0.resnets.1.conv1"]
    executions = [models.load(tmp_path / "out", execution=how) for how in ("simulate", "integer")]
    inputs = {
        "latents": jnp.asarray(drawn(1, 3, 4, 4, 12)), "timestep": jnp.array([700.0]),
        "context": jnp.asarray(drawn(1, 8, 24)),
    }  # fmt: skip
    ours, theirs = (one(**inputs) for one in executions)
    # The same integers, added up in another order: float32 rounding, which flips a code here and there further on.
    assert float(jnp.square(ours - theirs).sum() / jnp.square(ours).sum()) < 1e-4


@pytest.mark.parametrize(("missing", "change", "message"), [
    ("added_time_ids", {}, "no tensor 'added_time_ids'"),
    ("", {"image_latents": np.zeros((4, 6, 2), np.float32)}, "image_latents of shape .1, 1, 4, 6, 2."),
    ("", {"context": np.zeros((1, 23), np.float32)}, "a context of shape"),
    ("", {"image_latents": np.full((4, 6, 3), np.nan, np.float32)}, "no finite"),
])  # fmt: skip
def test_files_about_an_image_are_checked(qvdjax, tmp_path, missing, change, message):
    models.save(unet_spatio_temporal(**SVD_ONE_LEVEL), tmp_path / "model")
    tensors = {"context": drawn(1, 24), "image_latents": drawn(4, 6, 3), "added_time_ids": drawn(3), **change}
    save_file({name: array for name, array in tensors.items() if name != missing}, tmp_path / "image.safetensors")
    done = qvdjax(
        "sample", tmp_path / "model", "-o", tmp_path / "out.safetensors", "--context", tmp_path / "image.safetensors",
        "--steps", "2",
    )  # fmt: skip
    assert done.code == 2
    assert re.search(message, done.err), done.err
    assert not (tmp_path / "out.safetensors").exists()
