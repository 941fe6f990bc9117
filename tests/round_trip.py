"""A model written, read and written again."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

import models
from qvdjax.nn import VideoModel


def check_round_trip(model: VideoModel, folder: Path) -> VideoModel:
    """Save and load a model: static parts, types, values and the second folder's bytes are the same.

    Args:
        model: Any.
        folder: Where `one` and `two` are written.

    Returns:
        What was loaded.
    """

    def variables(model):
        return [(path, variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(model))]

    models.save(model, folder / "one")
    loaded = models.load(folder / "one")
    assert jax.tree.structure(loaded) == jax.tree.structure(model)  # layers, schemes, execution: all static parts
    for (path, saved), (_, read) in zip(variables(model), variables(loaded), strict=True):
        assert saved.dtype == read.dtype, path
        assert (np.asarray(saved) == np.asarray(read)).all(), path
    models.save(loaded, folder / "two")
    for file in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (folder / "one" / file).read_bytes() == (folder / "two" / file).read_bytes()
    return loaded
