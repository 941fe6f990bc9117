"""sample and encode-prompts of CogVideoX's image-to-video pipelines: a picture's latents beside a text."""

import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from published_folders import published_pipeline
from safetensors.numpy import load_file
from small_models import COGVIDEOX, COGVIDEOX_VARIANTS, randomised

import models
from models.image_latents import ImageLatents
from models.images import for_vae
from models.pipeline_folder import PipelineFolder

VAE = {
    "_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [8, 8, 8], "latent_channels": 5,
    "down_block_types": ["CogVideoXDownBlock3D"] * 3, "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.7, "invert_scale_latents": True,
    "temporal_compression_ratio": 4,
}  # fmt: skip
MODEL = {**COGVIDEOX, **COGVIDEOX_VARIANTS["1.5-5b-i2v"], "num_layers": 1}
VIDEO, STEPS = "9x32x24", ("--steps", "2")  # three frames of latents of 8 x 6, and one before them for the patches


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = published_pipeline(tmp_path_factory.mktemp("published") / "i2v", "cogvideox", VAE)
    shutil.rmtree(folder / "transformer")
    models.save(randomised(models.abstract(MODEL)), folder / "transformer")
    return folder


@pytest.fixture
def picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (18, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_the_first_frame_is_drawn_from_what_the_vae_makes_of_the_picture(pipeline):
    pictures = ImageLatents.open(PipelineFolder.open(pipeline), models.parse_config(MODEL))
    image = np.random.default_rng(1).integers(0, 255, (20, 28, 3), np.uint8)
    shown = pictures.encode(image, (4, 8, 6))["image_latents"]
    vae = models.load_vae(pipeline / "vae")
    posterior = vae.encode(for_vae(image, 32, 24)[None, None])
    deviation = np.exp(0.5 * np.asarray(posterior.log_variance))
    noise = np.asarray(jax.random.normal(jax.random.key(0), posterior.mean.shape))
    drawn = (np.asarray(posterior.mean) + deviation * noise)[0, 0] / VAE["scaling_factor"]
    # The same float32 arithmetic in one program and in several.
    np.testing.assert_allclose(shown[0], drawn, rtol=1e-4, atol=1e-4 * np.abs(drawn).max())
    assert shown.shape == pictures.shapes((4, 8, 6, 5))["image_latents"] == (4, 8, 6, 5)
    assert not shown[1:].any()
    tiled = pictures.encode(image, (4, 8, 6), tiling=models.Tiling((8, 8), (6, 6)))["image_latents"]  # a single tile
    np.testing.assert_allclose(tiled, shown, rtol=1e-4, atol=1e-4 * np.abs(shown).max())


def test_a_picture_becomes_a_video_as_from_its_file(qvdjax, pipeline, picture, tmp_path):
    texts, image = ("-p", "a cat", "-p", "a red cat"), ("--image", picture)
    done = qvdjax("sample", pipeline, "-o", tmp_path / "x.mp4", *texts, *image, "--video", VIDEO, *STEPS, "--json")
    assert done.code == 0, done.err
    assert (done.report["latents"], done.report["videos"][1]["frames"]) == ([4, 8, 6, 5], 9)
    assert done.report["image"] == str(picture)
    done = qvdjax(
        "encode-prompts", pipeline, tmp_path / "texts.safetensors", *texts, *image, "--video", VIDEO, "--json"
    )
    assert done.code == 0, done.err
    assert done.report["image"] == {"image_latents": [4, 8, 6, 5]}
    context = ("--context", tmp_path / "texts.safetensors", "--video", VIDEO)
    done = qvdjax("sample", pipeline, "-o", tmp_path / "y.safetensors", *context, *STEPS)
    assert done.code == 0, done.err
    done = qvdjax("sample", pipeline, "-o", tmp_path / "z.safetensors", *texts, *image, "--video", VIDEO, *STEPS)
    assert done.code == 0, done.err
    for ours, theirs in (("y-text0-0", "z-a-cat-0"), ("y-text1-0", "z-a-red-cat-0")):
        ours, theirs = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in (ours, theirs))
        assert theirs.shape == (3, 8, 6, 5)
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())  # one program, float32


def test_another_picture_is_another_video(qvdjax, pipeline, tmp_path):
    for name, level in (("dark", 20), ("light", 230)):
        Image.fromarray(np.full((32, 24, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
        done = qvdjax("sample", pipeline, "-o", tmp_path / f"{name}.safetensors", "-p", "a cat", *STEPS,
                      "--image", tmp_path / f"{name}.png", "--video", VIDEO)  # fmt: skip
        assert done.code == 0, done.err
    dark, light = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in ("dark", "light"))
    assert np.abs(dark - light).max() > 0.01 * np.abs(dark).max()


def test_what_encodes_a_picture_is_planned(qvdjax, pipeline, picture, tmp_path):
    common = ("sample", pipeline, "-o", tmp_path / "x.mp4", "-p", "a cat", "--image", picture, "--video", VIDEO, *STEPS)
    done = qvdjax(*common, "--memory-limit", "1GiB", "--json")
    assert done.code == 0, done.err
    assert done.report["memory_plan"]["peak_bytes"].keys() == {"text_encoder", "denoiser", "vae_encoder", "vae"}
    done = qvdjax(*common, "--memory-limit", "1kB")
    assert (done.code, "vae_encoder needs" in done.err) == (2, True), done.err


def test_calibration_and_quantization_follow_a_picture(qvdjax, pipeline, picture, tmp_path):
    done = qvdjax("encode-prompts", pipeline, tmp_path / "texts.safetensors", "-p", "a cat", "--image", picture,
                  "--video", VIDEO)  # fmt: skip
    assert done.code == 0, done.err
    transformer, calibration = pipeline / "transformer", tmp_path / "calibration"
    done = qvdjax("calibrate", transformer, calibration, "--context", tmp_path / "texts.safetensors", *STEPS)
    assert done.code == 0, done.err
    done = qvdjax(
        "quantize", transformer, tmp_path / "w8a8", "--recipe", "smoothquant-w8a8", "--calibration", calibration
    )
    assert done.code == 0, done.err
    done = qvdjax("sample", pipeline, "-o", tmp_path / "x.mp4", "-p", "a cat", "--image", picture, "--video", VIDEO,
                  *STEPS, "--denoiser", tmp_path / "w8a8")  # fmt: skip
    assert done.code == 0, done.err


def test_pictures_that_cannot_be_followed_are_said(qvdjax, pipeline, picture, tmp_path):
    def refused(folder, *options):
        done = qvdjax("sample", folder, "-o", tmp_path / "x.mp4", "-p", "a cat", "--video", VIDEO, *STEPS, *options)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        return done.err

    assert "follows an image, and there is none" in refused(pipeline)
    assert "only Stable Video Diffusion's pipeline" in refused(pipeline, "--image", picture, "--motion-bucket", "3")
    changed = shutil.copytree(pipeline, tmp_path / "pipeline")
    shutil.rmtree(changed / "transformer")
    models.save(randomised(models.abstract({**MODEL, "in_channels": 9})), changed / "transformer")
    assert "makes 5 channels of a picture, the model in" in refused(changed, "--image", picture)
    shutil.rmtree(changed / "vae")
    assert "lacks the folder vae" in refused(changed, "--image", picture)
