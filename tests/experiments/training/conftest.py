"""A model folder and a folder of latents, small enough that a training step compiles in seconds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.moving_shapes.captions import WORDS
from experiments.training.latents import write_folder
from models.pipeline import Pipeline

CONFIG = {
    "_class_name": "WanTransformer3DModel", "patch_size": [1, 2, 2], "num_attention_heads": 2,
    "attention_head_dim": 12, "in_channels": 12, "out_channels": 12, "text_dim": 8, "freq_dim": 16, "ffn_dim": 48,
    "num_layers": 2,
}  # fmt: skip


def _write_latents(path, *, frames=2, channels=12, dim=8, count=6):
    """Smooth latents, a colour each, and random contexts."""
    random = np.random.default_rng(0)
    examples = (
        {
            "latents": np.broadcast_to(random.standard_normal(channels), (frames, 4, 4, channels)).astype(np.float32),
            "context": random.standard_normal((8, dim), np.float32),
            "prompt": f"example {number}",
        }
        for number in range(count)
    )
    write_folder(path, examples, shard=4)
    return path


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Wan of 24 features and two blocks whose prediction is no zero, with a pipeline."""
    folder = tmp_path_factory.mktemp("models") / "small"
    model = models.build(CONFIG, key=jax.random.key(0))
    shape = model.proj_out.weight.shape
    model.proj_out.weight[...] = 0.3 * jax.random.normal(jax.random.key(1), shape, jnp.float32)
    models.save(model, folder)
    Pipeline(
        words=WORDS, embeddings=np.random.default_rng(0).standard_normal((len(WORDS), 8)).astype(np.float32), tokens=8,
        frames=2, height=4, width=4, channels=12, factor=2, solver="unipc", shift=3.0, steps=2, guidance_scale=4.0,
        fps=8.0,
    ).save(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def write_latents():
    """write_latents(path, frames=, channels=, dim=, count=) writes a data folder."""
    return _write_latents


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Six examples of what that model takes."""
    return _write_latents(tmp_path_factory.mktemp("data") / "latents")
