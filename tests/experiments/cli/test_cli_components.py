"""A pipeline's encoders and VAEs: quantized and listed as video models are, and what is refused."""

import re

import jax
import numpy as np
import pytest
from small_models import CLIP_VISION, UMT5, encoder_folder
from vae_parity import IMAGE

import models
import qvdjax as library
from models.encoders import load_encoder
from models.vae_folders import build_vae


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By kind, a folder with random weights."""
    root = tmp_path_factory.mktemp("components")
    models.save_vae(build_vae(IMAGE, key=jax.random.key(0)), root / "vae")
    return {
        "text": encoder_folder(root / "text_encoder", UMT5), "vae": root / "vae",
        "image": encoder_folder(root / "image_encoder", CLIP_VISION),
    }  # fmt: skip


LOADS = {"text": load_encoder, "image": load_encoder, "vae": models.load_vae}
ARCHITECTURES = {"text": "umt5", "image": "clip_vision_model", "vae": "AutoencoderKL"}


@pytest.mark.parametrize("kind", LOADS)
def test_a_component_is_quantized_and_listed(qvdjax, folders, tmp_path, kind):
    done = qvdjax("quantize", folders[kind], tmp_path / "int8", "--recipe", "rtn-w8a16", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.report["recipe"] == "rtn-w8a16"
    assert done.report["quantized_layers"] > 5
    model, expected = LOADS[kind](tmp_path / "int8"), library.quantize(LOADS[kind](folders[kind]), "rtn-w8a16")
    for one, other in zip(jax.tree.leaves(model), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)

    before, after = (qvdjax("info", folder, "--json").report for folder in (folders[kind], tmp_path / "int8"))
    assert before["family"] == after["family"] == ARCHITECTURES[kind]
    assert before["parameters"] == after["parameters"] > 1000
    assert before["weight_bytes"] > after["weight_bytes"]
    rounded = [row for row in after["layers"] if row["weight_bits"] == 8]
    assert len(rounded) >= len(after["layers"]) - 1  # CLIP's patches are embedded in floats
    assert all(row["sqnr_db"] > 20 for row in rounded)  # of 8 bits a channel, read from the folder
    assert "rtn-w8a16" not in str(before)


@pytest.mark.parametrize(("kind", "options", "said"), [
    ("text", ["--recipe", "s2q-vdit-w4a6"], "s2q-vdit-w4a6 needs a calibration set, and .*is the encoder umt5"),
    ("text", ["--recipe", "rtn-w8a16", "--calibration", "CAL"], "CAL was given, and .*video models.*rtn-w8a16"),
    ("vae", ["--recipe", "minmax-w8a8"], "needs a calibration set, and .*is the VAE AutoencoderKL"),
])  # fmt: skip
def test_what_they_cannot_be_is_said(qvdjax, folders, tmp_path, kind, options, said):
    done = qvdjax("quantize", folders[kind], tmp_path / "out", *options)
    assert done.code == 2
    assert "Traceback" not in done.err
    assert re.search(said, done.err), done.err
    assert not (tmp_path / "out").exists()


def test_a_broken_component_is_said(qvdjax, tmp_path):
    folder = encoder_folder(tmp_path / "text_encoder", UMT5)
    (folder / "model.safetensors").unlink()
    for arguments in (("info", folder), ("quantize", folder, tmp_path / "out", "--recipe", "rtn-w8a16")):
        done = qvdjax(*arguments)
        assert done.code == 2
        assert "Traceback" not in done.err
        assert str(folder) in done.err
