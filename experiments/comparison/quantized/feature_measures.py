"""How well a quantized UNet's temporal features still tell timesteps apart."""

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.metrics.temporal_features import Discriminability, discriminability
from qvdjax.nn import Linear, QuantizedLinear, VideoModel, layers_of
from qvdjax.ptq.feature_grids import ROLE, temporal_features

NAMES = tuple(field.name for field in dataclasses.fields(Discriminability))


def feature_measures(
    model: VideoModel, quantized: VideoModel, batches: Iterable[Mapping[str, jax.Array]]
) -> dict[str, dict[str, float | None]] | None:
    """Means over the layers that add the timestep to a UNet's blocks, at every timestep of a calibration set.

    Args:
        model: In full precision.
        quantized: What was made of it.
        batches: The calibration set.

    Returns:
        {"input": ..., "output": ...}, each measure of `qvdjax.metrics.temporal_features` of what the layers get and,
        weights rounded too, of what they give; None for what is infinite, because nothing is rounded. None in all for a
        model without such layers, or a set of one timestep.
    """
    features = temporal_features(model, batches)
    if not features or len(next(iter(features.values()))) < 2:
        return None
    exact = feature_layers(model)
    rows: dict[str, list[Discriminability]] = {"input": [], "output": []}
    for name, layer in feature_layers(quantized).items():
        x = jnp.asarray(features[name])
        rounded = layer.rounded_input(x) if isinstance(layer, QuantizedLinear) else x
        rows["input"].append(discriminability(x, rounded))
        rows["output"].append(discriminability(exact[name](x), layer(x)))
    return {
        side: {name: finite_mean(getattr(one, name) for one in found) for name in NAMES} for side, found in rows.items()
    }


def feature_layers(model: VideoModel) -> dict[str, nnx.Module]:
    """Layers of the role; those of UNets stand alone, not in stacks with a layer axis."""
    layers = layers_of(model, (Linear, QuantizedLinear))
    return {names[0]: layer for names, _, layer in layers if layer.role == ROLE}


def finite_mean(values: Iterable[float]) -> float | None:
    """The mean, None where it is not finite."""
    values = list(values)
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
