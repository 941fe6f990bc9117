"""Steps of inputs' grids as a learned function of the timestep (TDQ), found from how much each step would cost."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qvdjax.calibration.steps import of_one_timestep
from qvdjax.calibration.watching import Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, Scale, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, replace, shallow_copy
from qvdjax.numerics import Grid, fake_quantize
from qvdjax.parallel import to_host

Objective = Literal["output", "input"]
LEAST_OF_SILU = -0.2785  # the offset of TDQ's grid for inputs behind a SiLU; its minimum is -0.27846
_TINY = 1e-12


@dataclasses.dataclass(frozen=True)
class TimestepScales:
    """A step s(t) = softplus(MLP(sinusoids of t)) for every layer's input, trained towards the least error at the
    timesteps of a calibration set, and a table over these afterwards (TDQ, So et al., NeurIPS 2023, arXiv 2306.02316).

    The network has three hidden layers of 64 with ReLU and dropout, and its last bias starts at the inverse of softplus
    of s0 = (mean + 3 deviation) / (2^b / 2 - 1), or (mean + 16 deviation) / (2^b - 1) for inputs that are nowhere
    negative; inputs behind a SiLU are counted from its minimum (read in sally20921/LDM-Q, a copy of the authors' code).
    Inputs that are negative have the grid -2^(b-1) s to (2^(b-1) - 1) s.

    What a step costs is measured beforehand at `candidates` steps around s0, for each timestep, and interpolated along
    their logarithm, so that training needs no inputs; the release trains on the inputs themselves. Networks say the
    step in units of s0, so that all layers' learn at one rate.

    Attributes:
        objective: What error: of the layer's "output" with its input rounded, or of the "input".
        hidden, features: Width of the network, and sines and cosines of the timestep together; the latter is not known.
        iterations, rate: Of Adam; not known.
        dropout: Share of hidden values that are left out in a step of training.
        candidates, octaves: How many steps are tried, from 2^-octaves s0 to 2^octaves s0.
        seed: Of the networks and the dropout.
    """

    objective: Objective = "output"
    hidden: int = 64
    features: int = 64
    iterations: int = 2000
    rate: float = 1e-3
    dropout: float = 0.2
    candidates: int = 25
    octaves: float = 3.0
    seed: int = 0

    def __post_init__(self):
        if self.objective not in get_args(Objective):
            raise ValueError(f"the objective is the error of the input or the output, not {self.objective!r}")
        if self.candidates < 2 or self.iterations < 1 or not (self.rate > 0 and self.octaves > 0):
            raise ValueError("steps need two candidates, an iteration, a positive rate and positive octaves")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is a share in 0 to 1, not {self.dropout}")

    @property
    def factors(self) -> np.ndarray:
        """The candidates over s0, [candidates] ascending."""
        return 2.0 ** np.linspace(-self.octaves, self.octaves, self.candidates)


class Start(NamedTuple):
    """What a layer's grid is like: `step` s0, and `offset` the lowest value of a grid that begins there, None for one
    about zero."""

    step: float
    offset: float | None

    @classmethod
    def of(cls, mean: float, deviation: float, least: float, bits: int) -> "Start":
        """From the mean, deviation and smallest value of the inputs."""
        if least >= LEAST_OF_SILU:
            offset = 0.0 if least >= 0 else LEAST_OF_SILU
            return cls(max((mean - offset + 16 * deviation) / (2**bits - 1), _TINY), offset)
        return cls(max((abs(mean) + 3 * deviation) / (2**bits / 2 - 1), _TINY), None)

    def edges(self, steps, bits: int) -> tuple:
        """Ends of the range that a grid of these steps covers."""
        if self.offset is not None:
            return self.offset + 0 * steps, self.offset + steps * (2**bits - 1)
        return -(2 ** (bits - 1)) * steps, (2 ** (bits - 1) - 1) * steps


class Moments(Watcher):
    """A layer that keeps `mean`, `square` (the mean square) and `least` of its last input, [] each."""

    def __init__(self, layer: Linear | Conv):
        super().__init__(layer)
        zeros = jnp.zeros(leading_shape(layer.weight), jnp.float32)
        self.mean, self.square, self.least = (Statistic(zeros, axes=()) for _ in range(3))

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        x = x.astype(jnp.float32)
        self.mean[...], self.square[...], self.least[...] = x.mean(), jnp.square(x).mean(), x.min()


class Costs(Watcher):
    """A layer that keeps what each candidate of a range costs at its last input.

    Attributes:
        low, high: [candidates], ends of the ranges.
        errors: [candidates], sums of squares over those of what would be exact.
    """

    def __init__(self, layer: Linear | Conv, low: jax.Array, high: jax.Array, grid: Grid, objective: Objective):
        super().__init__(layer)
        self.low, self.high = (Scale(jnp.asarray(a, jnp.float32), axes=(None,)) for a in (low, high))
        self.errors = Statistic(jnp.zeros_like(self.low[...]), axes=(None,))
        self.grid, self.objective = grid, objective

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        of_output = self.objective == "output"
        exact = (self.layer(x) if of_output else x).astype(jnp.float32)
        size = jnp.maximum(jnp.square(exact - exact.mean()).sum(), _TINY)

        def error(ends):
            scale, zero_point = self.grid.from_range(*(end.reshape(1, 1) for end in ends))
            rounded = fake_quantize(x.reshape(-1, x.shape[-1]), self.grid, scale, zero_point).reshape(x.shape)
            found = self.layer(rounded.astype(x.dtype)) if of_output else rounded
            return jnp.square(found.astype(jnp.float32) - exact).sum() / size

        self.errors[...] = jax.lax.map(error, (self.low[...], self.high[...]))


_observe = jax.jit(observe)


def timestep_ranges(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], how: TimestepScales
) -> dict[str, tuple]:
    """The edges of every range of a timestep, by name in diffusers, for `apply_schemes`: float32 [timesteps] twice.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name; inputs with static ranges have one for each timestep, on grids with
            zero points, without transforms. Blocks of one stack are quantized alike.
        batches: Keyword arguments of the model's call. Gone over twice.
        how: What is learned.

    Raises:
        UserError: No batch; values that are not finite; blocks of one stack with different quantizers.
    """
    batches = list(batches) if iter(batches) is batches else batches
    starts = _starts(model, schemes, batches)
    timesteps, costs = _costs(model, schemes, batches, how, starts)
    names = list(costs)
    steps = learned_steps(
        np.array([starts[name].step for name in names]), timesteps, np.stack([costs[name] for name in names]), how
    )
    edges = {}
    for name, row in zip(names, np.asarray(steps, np.float32), strict=True):
        bits = schemes[name].activation.bits
        edges[name] = tuple(np.asarray(end, np.float32) for end in starts[name].edges(row, bits))
    return edges


def _static(schemes: Mapping[str, Any], names: list[str]) -> LayerScheme | None:
    """The scheme that the blocks of a layer have in common, if its input has ranges of timesteps."""
    found = {
        dataclasses.replace(schemes[n], reason="") for n in names
        if schemes[n].activation is not None and schemes[n].activation.granularity == "step"
    }  # fmt: skip
    if len(found) > 1 or (found and found != {dataclasses.replace(schemes[n], reason="") for n in names}):
        raise UserError(
            "steps are learned of blocks that are quantized alike", remedy="give them one rule", items=names
        )
    return found.pop() if found else None


def _starts(model, schemes, batches) -> dict[str, Start]:
    watched, total, calls = shallow_copy(model), None, 0
    for names, path, layer in layers_of(model, (Linear, Conv)):
        if _static(schemes, names) is not None:
            replace(watched, path, Moments(layer))
    for inputs in batches:
        new, calls = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs))), calls + 1
        total = new if total is None else jax.tree.map_with_path(_together, total, new)
    if total is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    starts = {}
    for names, kept in by_layer(watched, total):
        rows = zip(*(np.reshape(kept[k], (len(names),)) for k in ("mean", "square", "least")), strict=True)
        for name, (mean, square, least) in zip(names, rows, strict=True):
            mean, square = mean / calls, square / calls
            if not np.isfinite([mean, square, least]).all():
                raise UserError("calibration met values that are not finite", remedy="check the calibration set")
            bits = schemes[name].activation.bits
            starts[name] = Start.of(mean, max(square - mean**2, 0.0) ** 0.5, least, bits)
    return starts


def _together(path, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(a, b) if path[-1].key == "least" else a + b


def _costs(model, schemes, batches, how: TimestepScales, starts) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Timesteps, ascending, and by name what the candidates cost at each, [timesteps, candidates]."""
    watched = shallow_copy(model)
    for names, path, layer in layers_of(model, (Linear, Conv)):
        if (scheme := _static(schemes, names)) is None:
            continue
        bits = scheme.activation.bits
        ends = [np.stack(pair) for pair in zip(
            *(starts[name].edges(starts[name].step * how.factors, bits) for name in names), strict=True
        )]  # fmt: skip
        leading = leading_shape(layer.weight)
        low, high = (a if leading else a[0] for a in ends)  # layers candidates -> [layers,] candidates
        replace(watched, path, Costs(layer, low, high, scheme.activation.grid, how.objective))
    sums: dict[float, Any] = {}
    for timestep, inputs in of_one_timestep(batches):
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, dict(inputs)))
        total, calls = sums.get(timestep, (jax.tree.map(np.zeros_like, new), 0))
        sums[timestep] = jax.tree.map(np.add, total, new), calls + 1
    timesteps, costs = sorted(sums), {}
    for timestep in timesteps:
        total, calls = sums[timestep]
        for names, kept in by_layer(watched, total):
            rows = np.reshape(kept["errors"], (len(names), -1)) / calls
            for name, row in zip(names, rows, strict=True):
                costs.setdefault(name, []).append(row)
    return np.array(timesteps), {name: np.stack(rows) for name, rows in costs.items()}


def sinusoids(timesteps: jax.Array, features: int) -> jax.Array:
    """(timesteps,) -> [timesteps, features], sines behind cosines of frequencies from 1 to 1 / 10000."""
    frequencies = 10000.0 ** (-jnp.arange(features // 2) / (features // 2))
    angles = timesteps[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def learned_steps(start: np.ndarray, timesteps: np.ndarray, costs: np.ndarray, how: TimestepScales) -> np.ndarray:
    """What the networks give after training: s0 [layers], timesteps [timesteps] and costs [layers, timesteps,
    candidates] -> steps [layers, timesteps]."""
    # Layers count alike, and timesteps by what they can lose.
    relative = costs / np.maximum(costs.min(axis=-1).mean(axis=-1), _TINY)[:, None, None]
    arrays = (jnp.asarray(a, jnp.float32) for a in (start, timesteps, relative))
    return np.asarray(jax.device_get(_train(*arrays, how=how)))


@jax.jit(static_argnames="how")
def _train(start, timesteps, costs, *, how: TimestepScales) -> jax.Array:
    inputs = sinusoids(timesteps, how.features)
    places = jnp.log2(jnp.asarray(how.factors, jnp.float32))
    keys = jax.random.split(jax.random.key(how.seed), len(start))

    def one(key, start, costs):
        """One layer: s0 [], costs [timesteps, candidates] -> [timesteps]."""
        first, rest = jax.random.split(key)
        parameters, optimizer = _network(first, how), optax.adam(how.rate)

        def steps_of(parameters, drop):
            # In units of s0, so that networks of all layers learn at one rate; softplus and its inverse as published.
            return jax.nn.softplus(_apply(parameters, inputs, drop, how)) * start

        def cost(place, row):
            # Beyond the candidates nothing was measured: it costs more the further out, so that steps come back.
            beyond = jnp.maximum(places[0] - place, 0) + jnp.maximum(place - places[-1], 0)
            return jnp.interp(place, places, row) + row.max() * beyond

        def loss(parameters, key):
            return jax.vmap(cost)(jnp.log2(steps_of(parameters, key) / start), costs).mean()

        def step(state, number):
            parameters, kept = state
            gradient = jax.grad(loss)(parameters, jax.random.fold_in(rest, number))
            change, kept = optimizer.update(gradient, kept)
            return (optax.apply_updates(parameters, change), kept), None

        state = (parameters, optimizer.init(parameters))
        (parameters, _), _ = jax.lax.scan(step, state, jnp.arange(how.iterations))
        return start * jnp.clip(steps_of(parameters, None) / start, how.factors[0], how.factors[-1])

    return jax.lax.map(lambda a: one(*a), (keys, start, costs), batch_size=64)


def _network(key: jax.Array, how: TimestepScales) -> list[tuple[jax.Array, jax.Array]]:
    """Weights [out, in] and biases [out]; PyTorch's uniform initialisation, and a last bias whose softplus is one."""
    sizes = [how.features, how.hidden, how.hidden, how.hidden, 1]
    layers = []
    for number, (width, out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        weight_key, bias_key = jax.random.split(jax.random.fold_in(key, number))
        bound = width**-0.5
        layers.append(
            (jax.random.uniform(weight_key, (out, width), jnp.float32, -bound, bound),
             jax.random.uniform(bias_key, (out,), jnp.float32, -bound, bound))
        )  # fmt: skip
    layers[-1] = layers[-1][0], jnp.log(jnp.expm1(jnp.ones(1)))
    return layers


def _apply(parameters, x: jax.Array, key: jax.Array | None, how: TimestepScales) -> jax.Array:
    """x [timesteps, features] -> [timesteps]."""
    *hidden, (weight, bias) = parameters
    for number, (inner, offset) in enumerate(hidden):
        x = jax.nn.relu(x @ inner.T + offset)
        if key is not None and how.dropout:
            left = jax.random.bernoulli(jax.random.fold_in(key, number), 1 - how.dropout, x.shape)
            x = jnp.where(left, x / (1 - how.dropout), 0)
    return (x @ weight.T + bias)[:, 0]
