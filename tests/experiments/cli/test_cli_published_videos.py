"""sample of a whole published pipeline to an mp4, with its own model or a quantized one, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from published_folders import WAN_VAE, published_pipeline
from safetensors.numpy import load_file, save_file
from small_models import CLIP_VISION, WAN, encoder_folder, randomised

import models
from experiments.sampling import memory_plan, output
from experiments.sampling.request import Settings, request_from_context
from models.vae_wan import WanVAEConfig

SIZES = ["--steps", "2", "--frames", "2", "--height", "4", "--width", "6"]
SHOWN = (3, 8, 12, 3)  # 2 n + 1 frames of n + 1 latent ones; twice the height and width


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan", WAN_VAE)


@pytest.fixture
def shown(monkeypatch):
    """The videos that are written, before an mp4 rounds them."""
    videos, write = [], output.write_mp4

    def keep(path, video, **options):
        videos.append(video)
        write(path, video, **options)

    monkeypatch.setattr(output, "write_mp4", keep)
    return videos


def test_a_prompt_becomes_an_mp4(qvdjax, pipeline, tmp_path, shown, monkeypatch):
    read, alive = models.load_vae, []
    wide = models.abstract(json.loads((pipeline / "transformer" / "config.json").read_text()))
    feed_forward = wide.stacks[0].block.ffn.net["2"].weight.shape

    def load(*arguments, **options):
        alive.extend(array.shape for array in jax.live_arrays() if array.shape == feed_forward)
        return read(*arguments, **options)

    monkeypatch.setattr(models, "load_vae", load)
    common = ("sample", pipeline, "-p", "a red cat", "-p", "a cat", "--seeds", "3", *SIZES)
    assert qvdjax(*common, "-o", tmp_path / "x.safetensors").code == 0
    done = qvdjax(*common, "-o", tmp_path / "x.mp4", "--json")
    assert done.code == 0, done.err
    assert [video["prompt"] for video in done.report["videos"]] == ["a red cat", "a cat"]
    vae = read(pipeline / "vae")
    for name, video, record in zip(("a-red-cat", "a-cat"), shown, done.report["videos"], strict=True):
        latents = load_file(tmp_path / f"x-{name}-3.safetensors")["latents"]
        pixels = vae.decode(vae.denormalize(jax.numpy.asarray(latents)[None]))[0]
        assert video.shape == SHOWN
        assert 0 <= video.min() < video.max() <= 1
        # One compiled program against many, in float32.
        np.testing.assert_allclose(video, np.asarray(pixels) / 2 + 0.5, atol=1e-4)
        assert (record["frames"], record["height"], record["width"], record["fps"]) == (*SHOWN[:3], 16)
        assert record["vae"] == str(pipeline / "vae")
        assert (tmp_path / f"x-{name}-3.mp4").stat().st_size > 0
    assert not alive  # the model that sampled was freed before


def test_a_quantized_model_samples_in_the_place_of_the_pipelines(qvdjax, pipeline, tmp_path, shown):
    assert qvdjax("quantize", pipeline / "transformer", tmp_path / "w8a8", "--recipe", "rtn-w8a8").code == 0
    common = ("sample", pipeline, "-p", "a red cat", *SIZES, "--json")
    for options in ((), ("--denoiser", tmp_path / "w8a8")):
        done = qvdjax(*common, "-o", tmp_path / "x.mp4", *options)
        assert done.code == 0, done.err
    assert done.report["model"] == str(tmp_path / "w8a8")
    assert done.report["quantization"]["recipe"] == "rtn-w8a8"
    own, quantized = shown
    assert own.shape == quantized.shape == SHOWN
    assert not np.array_equal(own, quantized)


def test_without_sizes_the_published_ones_hold(pipeline, tmp_path):
    texts = {"context": np.ones((3, 24), np.float32), "negative_context": np.zeros((3, 24), np.float32)}
    save_file(texts, tmp_path / "texts.safetensors")
    folder = pipeline / "transformer"
    config = models.skeleton(folder).config

    def shape(**settings):
        request = request_from_context(folder, tmp_path / "texts.safetensors", config, None, [0], Settings(**settings))
        return request.latents_shape

    assert shape() == (21, 60, 104, 5)  # 81 frames of 480 x 832
    assert shape(frames=5, width=8) == (5, 60, 8, 5)


def test_what_cannot_be_decoded_is_said(qvdjax, pipeline, tmp_path):
    def refused(folder, *options):
        done = qvdjax("sample", folder, "-p", "a cat", "-o", tmp_path / "x.mp4", *SIZES, *options)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert not (tmp_path / "x.mp4").exists()
        return done.err

    changed = shutil.copytree(pipeline, tmp_path / "pipeline")
    config = changed / "vae" / "config.json"
    of_vae = json.loads(config.read_text())
    config.write_text(json.dumps({**of_vae, "z_dim": 4, "latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}))
    assert "latents of 4 channels, and the model samples 5" in refused(changed)
    config.write_text(json.dumps({**of_vae, "_class_name": "AutoencoderNew"}))
    assert "not a VAE that is known" in refused(changed)
    shutil.rmtree(changed / "vae")
    assert "lacks the folder vae, of its AutoencoderKLWan; download it too" in refused(changed)
    transformer = pipeline / "transformer"
    assert "is no pipeline whose model could be replaced" in refused(transformer, "--denoiser", transformer)
    assert "does not exist" in refused(pipeline, "--denoiser", tmp_path / "nowhere")


def test_the_video_says_how_large_its_latents_are(qvdjax, pipeline, tmp_path, shown):
    common = ("sample", pipeline, "-p", "a cat", "--steps", "1", "-o", tmp_path / "x.mp4")
    done = qvdjax(*common, "--video", "3x8x12", "--json")
    assert done.code == 0, done.err
    assert (done.report["latents"], shown[0].shape) == ([2, 4, 6, 5], SHOWN)
    for options, message in (
        (("--video", "4x8x12"), "a video of 4 frames; choose 2n + 1, such as 41, or cut the video"),
        (("--video", "3x9x12"), "a video of height 9; choose a multiple of 2"),
        (("--video", "3x8x10"), "latent width 5 is no multiple of the patch 2; make height and width multiples of 4"),
        (("--video", "0x8x12"), "a video of 0 frames of 8 x 12"),
        (("--video", "3x8"), "is no size; write frames, height and width like 81x480x832"),
        (("--video", "3x8x12", "--frames", "2"), "sizes of the latents are given beside the video's"),
        (("--frames", "2", "--height", "5", "--width", "6"), "latent height 5 is no multiple of the patch 2"),
        (("--memory-limit", "much"), "is no size; write it like 12GiB"),
        (("--image", "x.png"), "follows no image"),
    ):
        done = qvdjax(*common, *options)
        assert (done.code, done.err.count("\n")) == (2, 1), (options, done.err)
        assert message in done.err


@pytest.fixture(scope="module")
def image_pipeline(tmp_path_factory):
    """Wan's, of a model that follows an image of 8 x 8 for CLIP: its five tokens and two more channels and five."""
    folder = published_pipeline(tmp_path_factory.mktemp("published") / "i2v", "wan", WAN_VAE)
    shutil.rmtree(folder / "transformer")
    config = {**WAN, "num_layers": 1, "in_channels": 12, "image_dim": 24, "added_kv_proj_dim": 64}
    models.save(randomised(models.abstract(config)), folder / "transformer")
    encoder_folder(folder / "image_encoder", CLIP_VISION)
    (folder / "image_processor").mkdir()
    processor = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    (folder / "image_processor" / "preprocessor_config.json").write_text(json.dumps(processor))
    index = json.loads((folder / "model_index.json").read_text())
    index["image_encoder"] = ["transformers", "CLIPVisionModel"]
    index["image_processor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_a_video_follows_its_image(qvdjax, image_pipeline, tmp_path, shown):
    for name, level in (("dark", 20), ("light", 230)):
        Image.fromarray(np.full((16, 24, 3), level, np.uint8)).save(tmp_path / f"{name}.png")
        done = qvdjax("sample", image_pipeline, "-o", tmp_path / f"{name}.mp4", "-p", "a cat", "-p", "a red cat",
                      "--image", tmp_path / f"{name}.png", *SIZES, "--json")  # fmt: skip
        assert done.code == 0, done.err
        assert done.report["videos"][0]["image"] == str(tmp_path / f"{name}.png")
        assert done.report["negative_prompt"].startswith("镜头晃动，色调艳丽")
    assert [video.shape for video in shown] == [SHOWN] * 4
    assert np.abs(shown[0] - shown[2]).max() > 0.01


def test_what_encodes_an_image_is_planned_too(qvdjax, image_pipeline, tmp_path, monkeypatch):
    Image.fromarray(np.full((16, 24, 3), 90, np.uint8)).save(tmp_path / "a.png")
    common = ("sample", image_pipeline, "-p", "a cat", "--image", tmp_path / "a.png", "--steps", "1", "--json")
    sizes = ("--frames", "2", "--height", "16", "--width", "16")
    done = qvdjax(*common, *sizes, "-o", tmp_path / "x.mp4", "--memory-limit", "1GiB")
    assert done.code == 0, done.err
    peaks = done.report["memory_plan"]["peak_bytes"]
    assert peaks.keys() == {"text_encoder", "denoiser", "image_encoder", "vae_encoder", "vae"}
    assert done.report["memory_plan"]["tiling"] is None
    # In tiles of 8 x 8 latents, where the whole frame would be too much; what decodes is not needed for latents.
    monkeypatch.setattr(WanVAEConfig, "default_tiling", models.Tiling((8, 8), (6, 6)))
    monkeypatch.setattr(memory_plan, "_encoding", lambda pictures, size, tiling, dtype: {
        "vae_encoder": 10**9 if tiling is None else 10**6})  # fmt: skip
    done = qvdjax(*common, *sizes, "-o", tmp_path / "x.safetensors", "--memory-limit", "500MB")
    assert done.code == 0, done.err
    assert done.report["memory_plan"]["tiling"] == {"tile": [8, 8], "stride": [6, 6]}


def test_an_image_is_encoded_beside_the_prompts(qvdjax, image_pipeline, tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (16, 24, 3), np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.png")
    texts, image = ("-p", "a cat", "-p", "a red cat"), ("--image", tmp_path / "a.png")
    common = ("encode-prompts", image_pipeline, tmp_path / "texts.safetensors", *texts)
    done = qvdjax(*common, *image, "--video", "3x8x12", "--json")
    assert done.code == 0, done.err
    assert done.report["image"] == {"encoder_hidden_states_image": [5, 24], "image_latents": [2, 4, 6, 7]}
    context = ("--context", tmp_path / "texts.safetensors")
    folder, steps = image_pipeline / "transformer", ("--steps", "2")
    done = qvdjax("sample", folder, "-o", tmp_path / "x.safetensors", *context, *steps)
    assert done.code == 0, done.err
    done = qvdjax(
        "sample", image_pipeline, "-o", tmp_path / "y.safetensors", *texts, *image, "--video", "3x8x12", *steps
    )
    assert done.code == 0, done.err
    for one, other in (("x-text0-0", "y-a-cat-0"), ("x-text1-0", "y-a-red-cat-0")):
        ours, theirs = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in (one, other))
        np.testing.assert_allclose(ours, theirs, atol=1e-4)  # the same program on the same numbers
    done = qvdjax(*common, "--video", "3x8x12")
    assert (done.code, "says nothing about texts" in done.err) == (2, True)


@pytest.mark.parametrize(("change", "image", "message"), [
    (None, None, "follows an image, and there is none; give its first frame with --image"),
    (None, "none.png", "none.png does not exist"),
    (None, "text.png", "text.png cannot be read"),
    ("image_encoder", "good.png", "lacks the folder image_encoder, of its CLIPVisionModel; download it too"),
    ("image_processor", "good.png", "lacks the folder image_processor"),
    ("vae", "good.png", "lacks the folder vae"),
])  # fmt: skip
def test_images_that_cannot_be_followed_are_said(qvdjax, image_pipeline, tmp_path, change, image, message):
    folder = shutil.copytree(image_pipeline, tmp_path / "pipeline")
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    if change:
        shutil.rmtree(folder / change)
    options = () if image is None else ("--image", tmp_path / image)
    done = qvdjax("sample", folder, "-o", tmp_path / "x.mp4", "-p", "a cat", *SIZES, *options)
    assert (done.code, done.err.count("\n")) == (2, 1), done.err
    assert message in done.err


def test_an_image_encoder_of_another_width_is_said(qvdjax, image_pipeline, tmp_path):
    folder = shutil.copytree(image_pipeline, tmp_path / "pipeline")
    shutil.rmtree(folder / "image_encoder")
    encoder_folder(folder / "image_encoder", {**CLIP_VISION, "hidden_size": 30})
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "good.png")
    done = qvdjax("sample", folder, "-o", tmp_path / "x.mp4", "-p", "a cat", "--image", tmp_path / "good.png", *SIZES)
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert "makes 30 features of a picture, the model in" in done.err
    assert "takes 24 of CLIP's; put the model's own image encoder there" in done.err


def test_a_whole_pipeline_is_converted_or_said_to_lack_something(qvdjax, pipeline, tmp_path):
    done = qvdjax("convert", pipeline, tmp_path / "narrow", "--dtype", "bfloat16", "--dry-run")
    assert (done.code, list(tmp_path.iterdir())) == (0, [])
    assert "can be converted" in done.out
    assert all(name in done.out for name in ("text_encoder", "transformer", "vae", "tokenizer", "free on the disk"))
    done = qvdjax("convert", pipeline, tmp_path / "narrow", "--dtype", "bfloat16", "--json")
    assert done.code == 0, done.err
    assert {part["name"]: part["action"] for part in done.report["components"]}["vae"] == "convert"
    shutil.rmtree(tmp_path / "narrow" / "vae")
    done = qvdjax("convert", tmp_path / "narrow", tmp_path / "copy", "--dry-run")
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert "lacks the folder vae" in done.err
    assert "cannot be converted yet" in done.out
    done = qvdjax("convert", tmp_path / "narrow", tmp_path / "copy")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert not (tmp_path / "copy").exists()
