"""Small model folders that can be evaluated in seconds; random weights, so nothing here is about quality."""

import dataclasses
from pathlib import Path

import jax
import pytest

import models
import qvdjax
from experiments.moving_shapes.captions import WORDS
from experiments.moving_shapes.words import embeddings
from models.pipeline import Pipeline

CONFIG = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 12,
    "out_channels": 12,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}
PIPELINE = Pipeline(
    words=WORDS, embeddings=embeddings(), tokens=8, frames=9, height=16, width=16, channels=12, factor=2,
    solver="unipc", shift=3.0, steps=3, guidance_scale=2.0, fps=8,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Folders:
    """Paths of the folders made once for all tests here; tests must not change them."""

    reference: Path
    same: Path
    louder: Path
    w4a4: Path
    wider: Path


def _save(model, path: Path) -> Path:
    models.save(model, path)
    PIPELINE.save(path)
    return path


def _scaled_head(model, factor: float):
    """The same model with its prediction multiplied by `factor`: the head is linear."""
    model.proj_out.weight[...] = factor * model.proj_out.weight[...]
    model.proj_out.bias[...] = factor * model.proj_out.bias[...]
    return model


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Folders:
    root = tmp_path_factory.mktemp("evaluation")
    model = models.build(CONFIG, key=jax.random.key(1))
    return Folders(
        reference=_save(model, root / "full"),
        same=_save(model, root / "same"),
        louder=_save(_scaled_head(models.build(CONFIG, key=jax.random.key(1)), 1.1), root / "louder"),
        w4a4=_save(qvdjax.quantize(model, "rtn-w4a4"), root / "w4a4"),
        wider=_save(models.build({**CONFIG, "ffn_dim": 128}), root / "wider"),
    )
