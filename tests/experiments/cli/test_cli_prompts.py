"""encode-prompts, and sample of a whole published pipeline: what is written, and what is refused."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from published_folders import published_pipeline
from safetensors import safe_open
from safetensors.numpy import load_file

import models

SIZES = ["--steps", "2", "--frames", "2", "--height", "4", "--width", "6"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa red cat\r\n\r\n   \n a cat \n")  # a mark of UTF-8, empty lines, spaces
    return file


def test_prompts_become_what_a_model_is_sampled_from(qvdjax, pipeline, prompts, tmp_path):
    out = tmp_path / "texts.safetensors"
    done = qvdjax("encode-prompts", pipeline, out, "--prompts", prompts, "--negative-prompt", "cats", "--json")
    assert done.code == 0, done.err
    expected = {"file": str(out), "texts": 2, "tokens": 512, "dim": 24, "dtype": "float32", "cut": {}}
    assert {name: done.report[name] for name in expected} == expected
    assert (done.report["text_encoder"]["class"], done.report["text_encoder"]["recipe"]) == ("UMT5EncoderModel", None)
    tensors = load_file(out)
    assert {name: array.shape for name, array in tensors.items()} == {
        "context": (2, 512, 24), "negative_context": (512, 24),
    }  # fmt: skip
    with safe_open(out, "np") as file:
        said = file.metadata()
    assert (json.loads(said["prompts"]), said["negative_prompt"]) == (["a red cat", "a cat"], "cats")

    done = qvdjax("sample", pipeline / "transformer", "-o", tmp_path / "a.safetensors", "--context", out, *SIZES)
    assert done.code == 0, done.err
    whole = ["-p", "a red cat", "-p", "a cat", "--negative-prompt", "cats"]
    done = qvdjax("sample", pipeline, "-o", tmp_path / "b.safetensors", *whole, *SIZES, "--json")
    assert done.code == 0, done.err
    assert done.report["negative_prompt"] == "cats"
    assert [video["prompt"] for video in done.report["videos"]] == ["a red cat", "a cat"]
    assert done.report["text_encoder"]["class"] == "UMT5EncoderModel"
    for text, prompt in (("text0", "a-red-cat"), ("text1", "a-cat")):
        one, other = (
            load_file(tmp_path / name)["latents"]
            for name in (f"a-{text}-0.safetensors", f"b-{prompt}-0.safetensors")
        )  # fmt: skip
        assert one.shape == (2, 4, 6, 5)
        np.testing.assert_array_equal(one, other)  # the same program on the same numbers


def test_wan_is_guided_away_from_its_published_text(qvdjax, pipeline, tmp_path):
    common = ("sample", pipeline, "-o", tmp_path / "x.safetensors", "-p", "a cat", *SIZES)
    done = qvdjax(*common)
    assert done.code == 0, done.err
    assert "guided away from '色调艳丽，过曝，" in done.out
    assert "latents of 2 x 4 x 6\nunipc with shift 5, guidance 5\n" in done.out
    published = load_file(tmp_path / "x.safetensors")["latents"]
    done = qvdjax(*common, "--negative-prompt", "")  # as diffusers has it
    assert (done.code, "guided away" in done.out) == (0, False), done.err
    assert np.abs(published - load_file(tmp_path / "x.safetensors")["latents"]).max() > 1e-3
    done = qvdjax("encode-prompts", pipeline, tmp_path / "texts.safetensors", "-p", "a cat")
    assert done.code == 0, done.err
    with safe_open(tmp_path / "texts.safetensors", "np") as file:
        assert file.metadata()["negative_prompt"].startswith("色调艳丽")


def test_the_encoder_is_gone_before_the_model_is_read(qvdjax, pipeline, tmp_path, monkeypatch):
    read, seen = models.load, []

    def load(*arguments, **options):
        seen.append([array.shape for array in jax.live_arrays() if array.shape == (40, 24)])
        return read(*arguments, **options)

    monkeypatch.setattr(models, "load", load)
    done = qvdjax("sample", pipeline, "-o", tmp_path / "x.safetensors", "-p", "a cat", *SIZES)
    assert (done.code, seen) == (0, [[]]), done.err


def test_an_encoder_of_eight_bits(qvdjax, pipeline, prompts, tmp_path):
    common = ("encode-prompts", pipeline)
    assert qvdjax(*common, tmp_path / "f.safetensors", "--prompts", prompts, "--dtype", "bfloat16").code == 0
    done = qvdjax(
        *common, tmp_path / "q.safetensors", "--prompts", prompts, "--recipe", "rtn-w8a16", "--dtype", "float32",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.report["text_encoder"]["recipe"] == "rtn-w8a16"
    narrow, quantized = (load_file(tmp_path / f"{name}.safetensors")["context"] for name in "fq")
    assert (narrow.dtype, quantized.dtype) == (ml_dtypes.bfloat16, np.float32)
    narrow = narrow.astype(np.float32)
    # Both are near the encoder in float32: 8 bits of a mantissa, or codes of 8 bits, through three blocks.
    assert 0 < np.linalg.norm(narrow - quantized) < 0.1 * np.linalg.norm(quantized)


def test_what_is_cut_is_said(qvdjax, pipeline, tmp_path):
    long = "cat " * 600
    done = qvdjax("encode-prompts", pipeline, tmp_path / "x.safetensors", "-p", long)
    assert done.code == 0, done.err
    assert f"89 tokens were cut off the end of {long[:60] + '...'!r}" in done.out  # and one ends the text


@pytest.mark.parametrize(("content", "message"), [
    (b"\n  \n", "holds no prompt; write one prompt a line"),
    (b"", "holds no prompt"),
    (b"a cat\n\xff\xfe\n", "is not a text file in UTF-8"),
    (b"a cat\na cat\n", "some prompts are given more than once"),
])  # fmt: skip
def test_bad_files_of_prompts_are_said(qvdjax, pipeline, tmp_path, content, message):
    (tmp_path / "prompts.txt").write_bytes(content)
    done = qvdjax("encode-prompts", pipeline, tmp_path / "x.safetensors", "--prompts", tmp_path / "prompts.txt")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("verb", "options", "message"), [
    ("encode-prompts", ["OUT"], "no prompt given"),
    ("encode-prompts", ["x.mp4", "-p", "a"], "x.mp4 is not .safetensors"),
    ("encode-prompts", ["nowhere/x.safetensors", "-p", "a"], "nowhere does not exist"),
    ("encode-prompts", ["OUT", "-p", "a", "--batch", "0"], "a batch of 0 texts"),
    ("encode-prompts", ["OUT", "-p", "a", "--recipe", "gptq-w4a16"], "needs a calibration set"),
    ("sample", ["-o", "OUT", *SIZES], "no prompt given; give one with --prompt"),
    ("sample", ["-o", "OUT", "-p", "a", "--frames", "0"], "latents of 0 x 60 x 104"),
    ("sample", ["-o", "x.mp4", "-p", "a", *SIZES], "nothing here can decode its latents"),
    ("sample", ["-o", "OUT", "-p", "a", "--solver", "ddim", *SIZES], "ddim"),
    ("sample", ["-o", "OUT", "-p", "a", "-p", "a", *SIZES], "more than once"),
])  # fmt: skip
def test_what_cannot_be_done_is_said(qvdjax, pipeline, tmp_path, monkeypatch, verb, options, message):
    monkeypatch.chdir(tmp_path)
    done = qvdjax(verb, pipeline, *("x.safetensors" if option == "OUT" else option for option in options))
    assert done.code == 2, done.err
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_component_is_said(qvdjax, pipeline, tmp_path):
    folder = shutil.copytree(pipeline, tmp_path / "pipeline")
    shutil.rmtree(folder / "text_encoder")
    done = qvdjax("sample", folder, "-o", tmp_path / "x.safetensors", "-p", "a cat", *SIZES)
    assert done.code == 2
    assert "lacks the folder text_encoder, of its UMT5EncoderModel; download it too" in done.err
    # With a file of embeddings it is not needed.
    done = qvdjax(
        "sample", folder, "-o", tmp_path / "x.safetensors", "--context", tmp_path / "none.safetensors", *SIZES
    )
    assert "none.safetensors does not exist" in done.err
