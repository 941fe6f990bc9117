"""Small model folders for the verbs, and a way to run the program in this process."""

import json
from types import SimpleNamespace

import jax
import pytest
import small_models

import models
from experiments.cli.main import main
from experiments.moving_shapes import captions

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "patch_size": [1, 2, 2],
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 48,
    "num_layers": 2,
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Wan of 24 features and two blocks, with a pipeline of 3 frames of 4 x 4 latents (8 x 8 pixels)."""
    folder = tmp_path_factory.mktemp("models") / "small"
    models.save(models.build(CONFIG, key=jax.random.key(0)), folder)
    small_models.pipeline(captions.WORDS, 8, steps=2).save(folder)
    return folder


@pytest.fixture
def qvdjax(capsys):
    """Run the program: `qvdjax("info", folder)` -> code, out, err, and `report`, the JSON on stdout."""

    def run(*argv):
        code = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        report = json.loads(out) if "--json" in argv else None
        return SimpleNamespace(code=code, out=out, err=err, report=report)

    return run
