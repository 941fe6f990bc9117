"""The shipped Wan and a quantized one beside it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

import models
import qvdjax
from models.pipeline import copy_pipeline

CHECKPOINTS = Path(__file__).parents[3] / "experiments" / "moving_shapes" / "checkpoints"
RECIPE = "rtn-w4a4"


@pytest.fixture(scope="session")
def shipped(tmp_path_factory):
    """Model folders: `wan`, `cogvideox` and `w4a4`, which is `wan` in 4 bits. Tests must not change them."""
    wan, w4a4 = CHECKPOINTS / "wan", tmp_path_factory.mktemp("web") / "w4a4"
    models.save(qvdjax.quantize(models.load(wan), RECIPE), w4a4)
    copy_pipeline(wan, w4a4)
    return SimpleNamespace(wan=wan, w4a4=w4a4, cogvideox=CHECKPOINTS / "cogvideox")
