"""sample of a whole published pipeline to an mp4, with its own model or a quantized one, and what is refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from published_folders import WAN_VAE, published_pipeline
from safetensors.numpy import load_file, save_file

import models
from experiments.sampling import output
from experiments.sampling.request import Settings, request_from_context

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
