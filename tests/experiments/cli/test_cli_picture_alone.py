"""sample and encode-prompts of Stable Video Diffusion's pipeline, which follows a picture and no text."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from published_folders import PICTURE_MODEL, picture_pipeline
from safetensors.numpy import load_file

import models
from models.image_alone import ImageAlone, Motion
from models.pipeline_folder import PipelineFolder
from qvdjax.errors import UserError

SIZES = ("--steps", "2", "--video", "3x16x24")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return picture_pipeline(tmp_path_factory.mktemp("published") / "svd")


@pytest.fixture
def picture(tmp_path):
    random = np.random.default_rng(0)
    Image.fromarray(random.integers(0, 255, (18, 30, 3), np.uint8)).save(tmp_path / "My cat.png")
    return tmp_path / "My cat.png"


def test_a_picture_becomes_videos_as_from_its_file(qvdjax, pipeline, picture, tmp_path):
    told = ("--fps", "5", "--motion-bucket", "40", "--noise-augmentation", "0.1")
    done = qvdjax("sample", pipeline, "-o", tmp_path / "x.mp4", "--image", picture, "--seeds", "0,1", *SIZES, "--json")
    assert done.code == 0, done.err
    assert [video["file"] for video in done.report["videos"]] == [str(tmp_path / f"x-my-cat-{n}.mp4") for n in (0, 1)]
    assert done.report["motion"] == {"fps": 7.0, "motion_bucket": 127.0, "noise_augmentation": 0.02}
    assert {video["fps"] for video in done.report["videos"]} == {7}
    assert (done.report["latents"], done.report["first_frame_guidance"]) == ([3, 4, 6, 5], 1.0)
    done = qvdjax("sample", pipeline, "-o", tmp_path / "y.safetensors", "--image", picture, *SIZES, *told)
    assert done.code == 0, done.err
    file = tmp_path / "picture.safetensors"
    done = qvdjax("encode-prompts", pipeline, file, "--image", picture, "--video", "3x16x24", *told, "--json")
    assert done.code == 0, done.err
    shapes = {"context": [1, 24], "image_latents": [4, 6, 5], "added_time_ids": [3]}
    assert (done.report["image"], done.report["text_encoder"]) == (shapes, None)
    np.testing.assert_allclose(load_file(file)["added_time_ids"], [4, 40, 0.1], rtol=1e-6)
    unet = pipeline / "unet"
    assert qvdjax("sample", unet, "-o", tmp_path / "z.safetensors", "--context", file, "--steps", "2").code == 0
    ours, theirs = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "zy")
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())  # one program, float32


def test_what_encodes_a_picture_is_planned(qvdjax, pipeline, picture, tmp_path):
    common = ("sample", pipeline, "-o", tmp_path / "x.mp4", "--image", picture, *SIZES, "--json")
    done = qvdjax(*common, "--memory-limit", "1GiB")
    assert done.code == 0, done.err
    assert done.report["memory_plan"]["peak_bytes"].keys() == {"denoiser", "image_encoder", "vae_encoder", "vae"}
    assert done.report["memory_plan"]["texts"] is None


def test_an_encoder_of_codes_is_planned_as_it_is_read(qvdjax, pipeline, picture, tmp_path):
    def peak(folder):
        done = qvdjax("sample", folder, "-o", tmp_path / "x.safetensors", "--image", picture, *SIZES,
                      "--memory-limit", "1GiB", "--json")  # fmt: skip
        assert done.code == 0, done.err
        return done.report["memory_plan"]["peak_bytes"]["image_encoder"]

    copy = shutil.copytree(pipeline, tmp_path / "pipeline")
    shutil.rmtree(copy / "image_encoder")
    done = qvdjax("quantize", pipeline / "image_encoder", copy / "image_encoder", "--recipe", "rtn-w8a16")
    assert done.code == 0, done.err
    assert peak(copy) != peak(pipeline)


@pytest.mark.parametrize(("options", "message"), [
    ((), "follows an image, and there is none; give its first frame with --image"),
    (("--image", "PICTURE", "-p", "a cat"), "follows a picture and no text; leave out the prompts"),
    (("--image", "PICTURE", "--negative-prompt", "a cat"), "follows a picture and no text"),
    (("--image", "PICTURE", "--fps", "0.5"), "fps is 0.5; give a number of at least 1"),
    (("--image", "PICTURE", "--noise-augmentation", "-1"), "noise_augmentation is -1.0; give a number of at least 0"),
    (("--image", "none.png"), "none.png does not exist"),
])  # fmt: skip
def test_what_cannot_be_followed_is_said(qvdjax, pipeline, picture, tmp_path, options, message):
    options = [picture if option == "PICTURE" else option for option in options]
    for done in (
        qvdjax("sample", pipeline, "-o", tmp_path / "x.mp4", *SIZES, *options),
        qvdjax("encode-prompts", pipeline, tmp_path / "x.safetensors", *options),
    ):
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err


@pytest.mark.parametrize(("folder", "change", "message"), [
    ("image_encoder", {"projection_dim": 20}, "makes 20 features of a picture, the model in"),
    ("image_encoder", {"architectures": ["CLIPVisionModel"]}, "makes no vector of a picture"),
    ("vae", {"latent_channels": 4}, "latents of 4 channels, and the model samples 5"),
    ("feature_extractor", None, "lacks the folder feature_extractor, of its CLIPImageProcessor; download it too"),
])  # fmt: skip
def test_parts_of_another_model_are_said(qvdjax, pipeline, picture, tmp_path, folder, change, message):
    copy = shutil.copytree(pipeline, tmp_path / "pipeline")
    if change is None:
        shutil.rmtree(copy / folder)
    else:
        config = copy / folder / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    done = qvdjax("sample", copy, "-o", tmp_path / "x.safetensors", "--image", picture, *SIZES)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err


@pytest.mark.parametrize(("change", "message"), [
    ({"in_channels": 9}, "makes 5 channels of a picture, the model in .* takes 4"),
    ({"projection_class_embeddings_input_dim": 16}, "takes 2 numbers beside a picture; 3 are known"),
])  # fmt: skip
def test_a_model_of_other_inputs_is_said(pipeline, change, message):
    config = models.parse_config({**PICTURE_MODEL, **change})
    with pytest.raises(UserError, match=message):
        ImageAlone.open(PipelineFolder.open(pipeline), config, Motion())


def test_motion_is_refused_where_no_model_is_told_it(qvdjax, pipeline, tmp_path):
    done = qvdjax("sample", pipeline / "unet", "-o", tmp_path / "x.safetensors", "--context", "none.safetensors",
                  "--motion-bucket", "3")  # fmt: skip
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert "only Stable Video Diffusion's pipeline is told" in done.err
