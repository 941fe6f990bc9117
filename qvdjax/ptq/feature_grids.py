"""Grids of temporal features, fitted exactly: a sampler meets one feature a step, so all of them are known."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.steps import of_samples
from qvdjax.calibration.watching import Kept, Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.metrics.temporal_features import discriminability
from qvdjax.nn import Linear, QuantizedLinear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, own_shape, replace, shallow_copy
from qvdjax.numerics import FeatureGrid, to_levels
from qvdjax.parallel import to_host

ROLE = "temporal_feature"
Score = Literal["collapse", "signal"]


@dataclasses.dataclass(frozen=True)
class ChooseGrid:
    """Which of several grids a layer's temporal features are rounded to.

    QVD names discriminability as the aim; its own score and procedure were not at hand.

    Attributes:
        candidates: All of the same bits, or one alone.
        score: "collapse": the grid that tells most timesteps apart (`identity_rate`), of equals the one that makes the
            fewest numbers of neighbouring timesteps alike (`collapse`), of equals the one of "signal". "signal": the
            one behind whose layer most is left of what changes with the timestep (`centred_sqnr_db`).
    """

    candidates: tuple[FeatureGrid, ...]
    score: Score = "collapse"

    def __post_init__(self):
        if self.score not in get_args(Score):
            raise ValueError(f"unknown score of grids {self.score!r}: use {' or '.join(get_args(Score))}")

    @classmethod
    def among_all(cls, bits: int, score: Score = "collapse") -> "ChooseGrid":
        """Every kind that keeps to its bits; "log2", as released, takes one more."""
        logarithmic = [FeatureGrid("log", bits, steps) for steps in (1, 2, 4, 8)]
        mixed = [FeatureGrid("mixed", bits)] if bits > 2 else []
        return cls((FeatureGrid("symmetric", bits), FeatureGrid("asymmetric", bits), *logarithmic, *mixed), score)

    def choose(self, features: jax.Array, weight: jax.Array) -> FeatureGrid:
        """features [timesteps, in] in order, weight [out, in] -> the grid."""
        if len(self.candidates) == 1:
            return self.candidates[0]

        def merit(grid):
            rounded = to_levels(features, *grid.fit(features))
            behind = discriminability(*(jnp.matmul(a, weight.T.astype(a.dtype)) for a in (features, rounded)))
            if self.score == "signal":
                return behind.centred_sqnr_db
            measured = discriminability(features, rounded)
            return measured.identity_rate, -measured.collapse, behind.centred_sqnr_db

        return max(self.candidates, key=merit)


Levels = tuple[jax.Array, jax.Array]  # levels [count] and edges [count - 1] of a fitted grid


class KeptInput(Watcher):
    """A layer that keeps the inputs of its last call.

    Attributes:
        rows: [batch, in].
    """

    def __init__(self, layer: Linear, leading: tuple[int, ...], batch: int):
        super().__init__(layer)
        self.rows = Statistic(jnp.zeros((*leading, batch, own_shape(layer.weight)[1]), jnp.float32), axes=(None, None))

    def observe(self, x: jax.Array) -> None:
        """x [batch, ..., in], the same at all places between."""
        self.rows[...] = x.reshape(len(self.rows[...]), -1, x.shape[-1])[:, 0].astype(jnp.float32)


def temporal_features(model: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, np.ndarray]:
    """The inputs of all layers of role "temporal_feature", once for each timestep of a calibration set.

    Where other inputs have a say (Stable Video Diffusion adds the frame rate), those of the first sample that has the
    timestep count.

    Returns:
        Name in diffusers -> float32 [timesteps, in], by timestep, ascending. Empty where a model has no such layer.
    """
    if not any(layer.role == ROLE for _, _, layer in layers_of(model, (Linear,))):
        return {}
    rows: dict[float, dict[str, np.ndarray]] = {}
    for inputs in batches:
        timesteps = of_samples(inputs)
        wanted = {float(t): i for i, t in reversed(list(enumerate(timesteps))) if float(t) not in rows}
        if not wanted:
            continue
        watched = _watch(model, len(timesteps))
        kept = dict(_by_name(watched, _observe(watched, dict(inputs))))
        rows |= {t: {name: values[i] for name, values in kept.items()} for t, i in wanted.items()}
    ordered = [rows[timestep] for timestep in sorted(rows)]
    return {name: np.stack([row[name] for row in ordered]) for name in (ordered[0] if ordered else ())}


def _watch(model: VideoModel, batch: int) -> VideoModel:
    watched = shallow_copy(model)
    for _, path, layer in layers_of(model, (Linear,)):
        if layer.role == ROLE:
            replace(watched, path, KeptInput(layer, leading_shape(layer.weight), batch))
    return watched


def _by_name(watched: VideoModel, kept: Kept) -> Iterator[tuple[str, np.ndarray]]:
    for names, statistics in by_layer(watched, kept):
        rows = to_host(statistics["rows"])
        yield from zip(names, rows.reshape(len(names), *rows.shape[-2:]), strict=True)  # [layers,] b in -> layers b in


# Only what leads to the watched layers is computed: the rest is dead code under jit.
_observe = jax.jit(observe)


def fit_feature_grids(
    model: VideoModel, schemes: Mapping[str, Any], choose: ChooseGrid, batches: Iterable[Mapping[str, jax.Array]]
) -> tuple[dict[str, Any], dict[str, Levels]]:
    """Choose and fit the grid of every quantized layer of role "temporal_feature"; there may be none.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name in diffusers.
        choose: Among which grids. Layers of equal features may differ in the grid, by their weights.
        batches: Keyword arguments of the model's call, at two timesteps or more.

    Returns:
        The schemes with the chosen grids, and name -> levels and edges, for `fill_feature_grids`.

    Raises:
        UserError: Fewer than two timesteps.
    """
    schemes, fitted = dict(schemes), {}
    features = temporal_features(model, batches)
    for names, _, layer in layers_of(model, (Linear,)):
        if layer.role != ROLE:
            continue
        # [layers,] out in -> layers out in
        weights = layer.weight[...].reshape(len(names), *own_shape(layer.weight))
        for name, weight in zip(names, weights, strict=True):
            if not schemes[name].quantizes:
                continue
            values = jnp.asarray(features[name])
            if len(values) < 2:
                raise UserError(
                    "the calibration set has one timestep: nothing can be said about telling timesteps apart",
                    remedy="calibrate with at least two steps",
                )
            grid = choose.choose(values, weight)
            fitted[name] = grid.fit(values)
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
