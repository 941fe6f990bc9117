"""Round a video UNet's temporal features, and nothing else, to every grid, and measure what that does.

    python -m experiments.comparison.features.run [--model animatediff]

A temporal feature is the vector that tells a UNet's blocks the timestep. It depends on the timestep alone, so that one
prompt shows all that a sampler meets; several are sampled for what rounding does to predictions. One JSON file a model,
in docs/results/temporal-features-<model>, of which `python -m experiments.comparison.features.page` makes a table. The
model is one of the bench, or a folder with a pipeline.json.
"""

import argparse
import dataclasses
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import models
from experiments.calibrating import calibrate_folder, open_calibration
from experiments.comparison.command import run
from experiments.comparison.quantized.feature_measures import NAMES, feature_layers, finite_mean
from experiments.comparison.results import RESULTS
from experiments.moving_shapes.full_precision import CHECKPOINTS
from qvdjax.calibration.steps import timesteps_of
from qvdjax.errors import UserError
from qvdjax.metrics import bootstrap_interval, relative_error
from qvdjax.metrics.temporal_features import discriminability
from qvdjax.nn import Linear, TimestepTable, VideoModel, layers_of
from qvdjax.numerics import FeatureGrid, Quantizer, fake_quantize_dynamic, to_levels
from qvdjax.ptq.feature_grids import ChooseGrid, Score, temporal_features
from qvdjax.tabulation import tabulate

KIND, FILE = "temporal-features", "features.json"
BITS: Final = (8, 6, 5, 4, 3)

Round = Callable[[jax.Array], jax.Array]
"""Features [timesteps, in] -> what they become."""


def grids(bits: int) -> dict[str, FeatureGrid]:
    """Those with one set of levels for all timesteps, by the name of their row."""
    octave = {1: "base 2", 2: "2 codes an octave", 4: "4 codes an octave", 8: "8 codes an octave"}
    return {
        "symmetric": FeatureGrid("symmetric", bits),
        "asymmetric": FeatureGrid("asymmetric", bits),
        "powers of two, as released": FeatureGrid("log2", bits),
        **{f"logarithmic, {name}": FeatureGrid("log", bits, steps) for steps, name in octave.items()},
        "logarithmic, then uniform": FeatureGrid("mixed", bits),
    }


def on_grid(grid: FeatureGrid) -> Round:
    """Rounding to a grid that is fitted to all timesteps."""
    return lambda features: to_levels(features, *grid.fit(features))


def on_timesteps(bits: int) -> Round:
    """Rounding to a uniform grid of each timestep's own range, as TFMQ-DM has it."""
    quantizer = Quantizer(bits, symmetric=False, granularity="token", dynamic=True)
    return lambda features: fake_quantize_dynamic(features, quantizer)


def roundings(bits: int) -> dict[str, tuple[int, Round]]:
    """Row -> bits that a code takes, and the rounding."""
    shared = {name: (grid.stored_bits, on_grid(grid)) for name, grid in grids(bits).items()}
    return {**shared, "asymmetric, a range each timestep": (bits, on_timesteps(bits))}


@dataclasses.dataclass(frozen=True)
class Bench:
    """A model's features, and a model that takes rounded ones.

    Attributes:
        features: Name of a layer -> what it gets at each timestep, [timesteps, in], timesteps ascending.
        layers: Name of a layer -> the layer.
        tabulated: The model with a table in the place of each layer; tables need no other program for other features.
        trajectories: Keyword arguments of calls, one of a whole trajectory, without and with guidance's prompt; those
            of a prompt behind one another.
        prompts: How many.
        exact: What `tabulated` predicts at these.
    """

    features: Mapping[str, np.ndarray]
    layers: Mapping[str, Linear]
    tabulated: VideoModel
    trajectories: Sequence[Mapping[str, np.ndarray]]
    prompts: int
    exact: Sequence[jax.Array]

    @classmethod
    def of(cls, folder: Path, prompts: int) -> "Bench":
        """Sample a model folder; UserError where the model has no temporal features."""
        model = models.load(folder)
        layers = feature_layers(model)
        if not layers:
            raise UserError(f"{folder} has no layers that add the timestep to blocks", remedy="give a video UNet")
        with tempfile.TemporaryDirectory() as made:
            calibrate_folder(folder, Path(made) / "calibration", count=prompts)
            calibration = open_calibration(Path(made) / "calibration", folder)
            trajectories = list(calibration.batches(batch=len(calibration.trajectory(0).timestep)))
        tabulated = tabulate(model, timesteps_of(trajectories))
        exact = [_predict(tabulated, inputs) for inputs in trajectories]
        return cls(temporal_features(model, trajectories), layers, tabulated, trajectories, prompts, exact)

    def measured(self, rounding: Round) -> dict[str, Any]:
        """What a rounding does, fitted to each layer's features.

        Returns:
            Means over layers of `NAMES`; "after", the centred ratio behind each layer's weight, in decibels; and
            "error", the relative squared error of predictions, with its interval over prompts.
        """
        rows: dict[str, list[float]] = {name: [] for name in (*NAMES, "after")}
        outputs = {}
        for name, values in self.features.items():
            exact, layer = jnp.asarray(values), self.layers[name]
            found = rounding(exact)
            for measure, value in dataclasses.asdict(discriminability(exact, found)).items():
                rows[measure].append(value)
            outputs[name] = layer(found)
            rows["after"].append(discriminability(layer(exact), outputs[name]).centred_sqnr_db)
        means = {name: finite_mean(values) for name, values in rows.items()}
        return {**means, "error": bootstrap_interval(self.errors(outputs)).to_dict()}

    def errors(self, outputs: Mapping[str, jax.Array]) -> np.ndarray:
        """What layers' outputs [timesteps, out] in the place of their own do to predictions, (prompts,)."""
        model = nnx.clone(self.tabulated)
        for names, _, table in layers_of(model, (TimestepTable,)):
            if names[0] in outputs:
                table.table[...] = outputs[names[0]]
        found = [
            relative_error(_predict(model, inputs), exact, axis=(1, 2, 3, 4)).mean()  # steps f h w c -> steps
            for inputs, exact in zip(self.trajectories, self.exact, strict=True)
        ]
        return np.reshape(found, (self.prompts, -1)).mean(axis=1)  # prompts branches -> prompts

    def chosen(self, bits: int, score: Score) -> dict[str, int]:
        """Row -> layers for which a score chooses that grid."""
        choose, names = ChooseGrid.among_all(bits, score), {grid: name for name, grid in grids(bits).items()}
        taken = (choose.choose(jnp.asarray(x), self.layers[name].weight[...]) for name, x in self.features.items())
        return dict(Counter(names[grid] for grid in taken))


_predict = jax.jit(lambda model, inputs: model(**inputs))


def about(features: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What the features look like, over all layers and timesteps.

    Returns:
        {timesteps, width, largest, lowest, negative (share), skewness, changing (share of their energy that is not
        their mean over timesteps)}.
    """
    every = np.stack(list(features.values())).astype(np.float64)  # layers timesteps in
    apart, centred = every - every.mean(), every - every.mean(axis=1, keepdims=True)
    return {
        "timesteps": every.shape[1], "width": every.shape[2], "largest": every.max(), "lowest": every.min(),
        "negative": (every < 0).mean(), "skewness": (apart**3).mean() / (apart**2).mean() ** 1.5,
        "changing": (centred**2).sum() / (every**2).sum(),
    }  # fmt: skip


def compare(folder: Path, prompts: int) -> dict[str, Any]:
    """All grids at all `BITS` on the features of a model folder; UserError where the model has none."""
    bench = Bench.of(folder, prompts)
    return {
        "prompts": prompts, "layers": len(bench.features), "features": about(bench.features),
        "chosen": {score: {str(bits): bench.chosen(bits, score) for bits in BITS} for score in get_args(Score)},
        "rows": [
            {"row": name, "bits": bits, "stored_bits": stored, **bench.measured(rounding)}
            for bits in BITS for name, (stored, rounding) in roundings(bits).items()
        ],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    """Run it, and write over what is there."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.comparison.features.run", description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="animatediff", help="shipped bench model, or a model folder")
    parser.add_argument("--prompts", type=int, default=8, help="that are sampled")
    parser.add_argument("--out", type=Path, help=f"folder of results (default: docs/results/{KIND}-MODEL)")
    options = parser.parse_args(argv)
    folder = Path(options.model) if Path(options.model).is_dir() else CHECKPOINTS / options.model
    found = compare(folder, options.prompts)
    out = options.out or RESULTS / f"{KIND}-{folder.name}"
    out.mkdir(parents=True, exist_ok=True)
    facts = {"model": folder.name, **found, "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    (out / FILE).write_text(json.dumps(facts, indent=1) + "\n")
    print(out / FILE)


if __name__ == "__main__":
    run(main)
