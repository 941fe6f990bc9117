"""Grids of temporal features, fitted exactly: a sampler meets one feature a step, so all of them are known."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.metrics.temporal_features import discriminability
from qvdjax.nn import Linear, QuantizedLinear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import replace, shallow_copy, shape_of
from qvdjax.numerics import FeatureGrid, to_levels


@dataclasses.dataclass(frozen=True)
class ChooseGrid:
    """Which of several grids a layer's temporal features are rounded to.

    The one that tells most timesteps apart (`identity_rate`), of equals the one that makes the fewest numbers of
    neighbouring timesteps alike (`collapse`), of equals the one whose error behind the layer's weight is smallest. QVD
    names discriminability as the aim; its own score and procedure were not at hand.

    Attributes:
        candidates: All of the same bits, or one alone.
    """

    candidates: tuple[FeatureGrid, ...]

    @classmethod
    def among_all(cls, bits: int) -> "ChooseGrid":
        """Every kind that keeps to its bits; "log2", as released, takes one more."""
        logarithmic = [FeatureGrid("log", bits, steps) for steps in (1, 2, 4, 8)]
        mixed = [FeatureGrid("mixed", bits)] if bits > 2 else []
        return cls((FeatureGrid("symmetric", bits), FeatureGrid("asymmetric", bits), *logarithmic, *mixed))

    def choose(self, features: jax.Array, weight: jax.Array) -> FeatureGrid:
        """features [timesteps, in] in order, weight [out, in] -> the grid."""
        if len(self.candidates) == 1:
            return self.candidates[0]

        def merit(grid):
            rounded = to_levels(features, *grid.fit(features))
            measured = discriminability(features, rounded)
            behind = discriminability(*(jnp.matmul(a, weight.T.astype(a.dtype)) for a in (features, rounded)))
            return measured.identity_rate, -measured.collapse, behind.centred_sqnr_db

        return max(self.candidates, key=merit)


Levels = tuple[jax.Array, jax.Array]  # levels [count] and edges [count - 1] of a fitted grid


class KeptInput(Watcher):
    """A layer that keeps the inputs of its last call.

    Attributes:
        rows: [timesteps, in].
    """

    def __init__(self, layer: Linear, leading: tuple[int, ...], timesteps: int):
        super().__init__(layer)
        width = shape_of(layer.weight)[-1]
        self.rows = Statistic(jnp.zeros((*leading, timesteps, width), jnp.float32), axes=(None, None))

    def observe(self, x: jax.Array) -> None:
        """x [timesteps, (1,) in]."""
        self.rows[...] = x.reshape(self.rows.shape).astype(jnp.float32)  # t (1) in -> t in


def temporal_features(model: VideoModel, names: Iterable[str], timesteps: Iterable[float]) -> dict[str, np.ndarray]:
    """The inputs of layers that see the timestep alone.

    Args:
        model: A float model.
        names: Of the layers, in diffusers.
        timesteps: 0..1000.

    Returns:
        Name -> float32 [timesteps, in].

    Raises:
        ValueError: Layers that see more than the timestep, or that are no linear ones.
    """
    names, timesteps = set(names), jnp.asarray(list(timesteps), jnp.float32)
    if not names:
        return {}
    watched, config = shallow_copy(model), model.config
    for found, path, layer in layers_of(model, (Linear,)):
        if names.intersection(found) and layer.role in model.timestep_roles:
            own = len(layer.weight.get_metadata("axes"))
            replace(watched, path, KeptInput(layer, shape_of(layer.weight)[:-own], len(timesteps)))
    count = len(timesteps)
    kept = _observe(
        watched,
        {
            "latents": jnp.zeros((count, *config.least_size, config.in_channels), jnp.float32), "timestep": timesteps,
            "context": jnp.zeros((count, config.text_tokens, config.text_dim), jnp.float32),
            **{name: jnp.zeros((count, *shape), jnp.float32) for name, shape in config.conditions.items()},
        },
    )  # fmt: skip
    features = {}
    for found, statistics in by_layer(watched, kept):
        rows = np.asarray(statistics["rows"])
        features.update(zip(found, rows.reshape(len(found), count, -1), strict=True))  # ([layers,] t in) -> layers t in
    if missing := sorted(names - set(features)):
        raise ValueError(f"{missing}: layers that do not see the timestep alone have no temporal features")
    return {name: features[name] for name in features if name in names}


# Only what leads to the watched layers is computed: the rest is dead code under jit.
_observe = jax.jit(observe)


def fit_feature_grids(
    model: VideoModel, schemes: Mapping[str, Any], choose: ChooseGrid, timesteps: list[float]
) -> tuple[dict[str, Any], dict[str, Levels]]:
    """Choose and fit the grid of every quantized layer of role "temporal_feature"; there may be none.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name in diffusers.
        choose: Among which grids. Layers of equal features may differ in the grid, by their weights.
        timesteps: At least two, those that calibration met.

    Returns:
        The schemes with the chosen grids, and name -> levels and edges, for `fill_feature_grids`.

    Raises:
        UserError: Fewer than two timesteps.
    """
    schemes, fitted = dict(schemes), {}
    weights = {}
    for names, _, layer in layers_of(model, (Linear,)):
        if layer.role == "temporal_feature":
            value, width = layer.weight[...], layer.weight.get_value().shape[-2:]
            rows = value.reshape(len(names), *width)  # [[layers,] out, in] -> [layers, out, in]
            weights |= {name: rows[i] for i, name in enumerate(names) if schemes[name].quantizes}
    if weights and len(timesteps) < 2:
        raise UserError(
            f"the calibration set has {len(timesteps)} timestep: nothing can be said about telling timesteps apart",
            remedy="calibrate with at least two steps",
        )
    for name, features in temporal_features(model, weights, timesteps).items():
        grid = choose.choose(jnp.asarray(features), weights[name])
        fitted[name] = grid.fit(jnp.asarray(features))
        reason = f"{schemes[name].reason}; {_words(grid)}"
        schemes[name] = dataclasses.replace(schemes[name], feature_grid=grid, reason=reason)
    return schemes, fitted


def fill_feature_grids(model: VideoModel, fitted: Mapping[str, Levels]) -> None:
    """Put fitted levels and edges, by name, into a quantized model, in place."""
    for names, _, layer in layers_of(model, (QuantizedLinear,)):
        if names[0] in fitted:
            found = (jnp.stack(rows) for rows in zip(*(fitted[name] for name in names), strict=True))
            for variable, rows in zip((layer.input_levels, layer.input_edges), found, strict=True):
                variable[...] = rows.reshape(variable[...].shape)  # layers count -> [layers,] count


def _words(grid: FeatureGrid) -> str:
    """A grid for the table that users read."""
    if grid.kind == "log":
        return f"its input on a logarithmic grid, {grid.steps} codes an octave"
    extra = ", which takes a bit more than it says" if grid.kind == "log2" else ""
    return f"its input on a grid of kind {grid.kind}{extra}"


def describe_features(features: np.ndarray, grids: Iterable[FeatureGrid]) -> list[dict[str, Any]]:
    """One row a grid: what it does to features [timesteps, in]; NaN-free for a table or a plot."""
    rows, values = [], jnp.asarray(features)
    for grid in grids:
        measured = dataclasses.asdict(discriminability(values, to_levels(values, *grid.fit(values))))
        rows.append({**dataclasses.asdict(grid), **{k: v if math.isfinite(v) else None for k, v in measured.items()}})
    return rows
