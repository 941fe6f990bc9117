"""HunyuanVideo's whole pipeline on the command line: from a prompt to an mp4, its embeddings, what is refused."""

import dataclasses

import numpy as np
import pytest
from published_folders import published_pipeline
from safetensors.numpy import load_file

from models.prompts import RULES

VAE = {
    "_class_name": "AutoencoderKLHunyuanVideo", "block_out_channels": [8, 8, 12], "latent_channels": 5,
    "down_block_types": ["HunyuanVideoDownBlock3D"] * 3, "up_block_types": ["HunyuanVideoUpBlock3D"] * 3,
    "layers_per_block": 1, "norm_num_groups": 4, "spatial_compression_ratio": 4, "temporal_compression_ratio": 4,
}  # fmt: skip
SIZES = ("--steps", "2", "--frames", "2", "--height", "4", "--width", "6")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "hunyuanvideo", "hunyuanvideo", VAE)


@pytest.fixture(autouse=True)
def short_request(monkeypatch):
    """The small tokenizer cuts the real one into more tokens than there are."""
    monkeypatch.setitem(
        RULES, "hunyuanvideo", dataclasses.replace(RULES["hunyuanvideo"], template="a s {} red", crop=2)
    )


def test_a_prompt_becomes_an_mp4_as_from_its_embeddings(qvdjax, pipeline, tmp_path):
    common = ("--seeds", "3", *SIZES, "--json")
    direct = qvdjax("sample", pipeline, "-p", "a red cat", "-p", "a disc", *common, "-o", tmp_path / "x.mp4")
    assert direct.code == 0, direct.err
    assert (tmp_path / "x-a-red-cat-3.mp4").stat().st_size > 0
    assert direct.report["memory"].keys() == {"text_encoder", "denoiser", "vae"}
    assert direct.report["guidance_scale"] == 6.0
    kept = qvdjax("sample", pipeline, "-p", "a red cat", "-p", "a disc", *common, "-o", tmp_path / "y.safetensors")
    assert kept.code == 0, kept.err
    texts = tmp_path / "texts.safetensors"
    encoded = qvdjax("encode-prompts", pipeline, texts, "-p", "a red cat", "-p", "a disc", "--json")
    assert encoded.code == 0, encoded.err
    assert (encoded.report["texts"], encoded.report["tokens"], encoded.report["dim"]) == (2, 256, 24)
    assert load_file(texts).keys() == {"context", "pooled_projections", "encoder_attention_mask"}
    from_file = qvdjax("sample", pipeline, "--context", texts, *common, "-o", tmp_path / "z.safetensors")
    assert from_file.code == 0, from_file.err
    mine = [load_file(tmp_path / f"y-{name}-3.safetensors")["latents"] for name in ("a-red-cat", "a-disc")]
    for number, latents in enumerate(mine):
        np.testing.assert_array_equal(load_file(tmp_path / f"z-text{number}-3.safetensors")["latents"], latents)
    assert np.abs(mine[0] - mine[1]).max() > 1e-3  # the text matters


def test_it_is_planned_for_a_limit_of_memory(qvdjax, pipeline, tmp_path):
    options = ("-p", "a cat", *SIZES, "--memory-limit", "1GiB", "--json", "-o", tmp_path / "x.mp4")
    done = qvdjax("sample", pipeline, *options)
    assert done.code == 0, done.err
    assert done.report["memory_plan"]["peak_bytes"].keys() == {"text_encoder", "denoiser", "vae"}


def test_what_it_does_not_take_is_refused(qvdjax, pipeline, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for command, message in (
        (("sample", pipeline, "-p", "a cat", *SIZES, "--negative-prompt", "a dog", "-o", tmp_path / "x.mp4"),
         "leave out the negative prompt"),
        (("encode-prompts", pipeline, tmp_path / "x.safetensors", "-p", "a cat", "--negative-prompt", "a dog"),
         "leave out the negative prompt"),
        (("encode-videos", clips, pipeline, tmp_path / "data"), "more of a text than a folder of latents holds"),
    ):  # fmt: skip
        done = qvdjax(*command)
        assert (done.code, done.err.count("\n")) == (2, 1), done.err
        assert message in done.err
