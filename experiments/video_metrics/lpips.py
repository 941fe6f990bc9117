"""LPIPS 0.1 with AlexNet (arXiv 1801.03924): how different two images look to a network's features.

Read in richzhang/PerceptualSimilarity `lpips/lpips.py` and `lpips/pretrained_networks.py`.
"""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.video_metrics.weights import ALEXNET, LPIPS_HEADS, pytorch
from qvdjax.errors import UserError

# Of the layers behind whose activations images are compared: number in torchvision's `features`, stride, padding, and
# whether pooling comes before.
_LAYERS = ((0, 4, 2, False), (3, 1, 2, True), (6, 1, 1, True), (8, 1, 1, False), (10, 1, 1, False))
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
LEAST = 63  # pixels: less becomes nothing on the way


def load_lpips(folder: Path) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The metric, from a folder with both of its files.

    Returns:
        A function of two arrays of images (images, height, width, rgb), uint8, that gives (images,).

    Raises:
        UserError: A file is missing or another one, or PyTorch is not installed.
    """
    paths = [file.checked(folder) for file in (ALEXNET, LPIPS_HEADS)]
    torch = pytorch("LPIPS")
    network, heads = (
        {name: tensor.numpy() for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()}
        for path in paths
    )
    layers = [(network[f"features.{number}.weight"], network[f"features.{number}.bias"]) for number, *_ in _LAYERS]
    weights = [heads[f"lin{number}.model.1.weight"].reshape(-1) for number in range(len(_LAYERS))]
    call = jax.jit(lambda one, other: distance(layers, weights, one, other))

    def measure(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        if one.shape != other.shape or min(one.shape[1:3]) < LEAST:
            raise UserError(
                f"LPIPS compares images of one size of at least {LEAST} pixels, not {one.shape[1:3]} and"
                f" {other.shape[1:3]}",
                remedy="enlarge the videos (--scale of sample)",
            )
        pairs = zip(one, other, strict=True)
        return np.array([float(call(first[None], second[None])[0]) for first, second in pairs])  # h w c -> 1 h w c

    return measure


def distance(layers, weights, one: jax.Array, other: jax.Array) -> jax.Array:
    """Two batches of images (batch, height, width, rgb), 0 to 255 -> (batch,).

    Args:
        layers: (weight [out, in, rows, columns], bias [out]) of each.
        weights: [out] of each: how much a feature's squared difference counts.
        one, other: The images.
    """
    total = 0.0
    for (x, y), weight in zip(zip(_features(layers, one), _features(layers, other), strict=True), weights, strict=True):
        total = total + (jnp.square(_unit(x) - _unit(y)) @ jnp.asarray(weight)).mean(axis=(1, 2))  # (batch,)
    return total


def _features(layers, images: jax.Array) -> list[jax.Array]:
    x = (jnp.asarray(images, jnp.float32) / 127.5 - 1 - jnp.array(_SHIFT)) / jnp.array(_SCALE)
    found = []
    for (weight, bias), (_, stride, padding, pooled) in zip(layers, _LAYERS, strict=True):
        if pooled:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "VALID")
        x = jax.lax.conv_general_dilated(
            x, jnp.asarray(weight), (stride, stride), [(padding, padding)] * 2,
            dimension_numbers=("NHWC", "OIHW", "NHWC"), precision="highest",
        )  # fmt: skip
        x = jax.nn.relu(x + jnp.asarray(bias))
        found.append(x)
    return found


def _unit(features: jax.Array) -> jax.Array:
    return features / (jnp.sqrt(jnp.square(features).sum(axis=-1, keepdims=True)) + 1e-10)
