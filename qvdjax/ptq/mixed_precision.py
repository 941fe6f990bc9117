"""Bits of weights layer by layer: more where rounding costs more, within an average."""

import dataclasses
import functools
import heapq
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.moments import passes, second_moments
from qvdjax.errors import UserError
from qvdjax.nn import InputTransform, LayerScheme, Linear, VideoModel, layers_of
from qvdjax.nn.variables import at, shallow_copy, shape_of
from qvdjax.numerics import BITS, encode
from qvdjax.ptq.apply import Ranges
from qvdjax.ptq.layers import prepare_weight
from qvdjax.ptq.rounding import quantized_weights


@dataclasses.dataclass(frozen=True)
class MixedPrecision:
    """How the bits of a recipe's weights are shared out.

    Attributes:
        average: Bits a weight, over all weights that the recipe quantizes; scales not counted.
        choices: Bits that a layer may have, ascending.
        inputs: Model inputs on which a layer's effect on the prediction is measured, spread over the calibration set.
        memory: GiB of second moments that are collected at a time.
    """

    average: float
    choices: tuple[int, ...] = (2, 3, 4, 5, 6, 8)
    inputs: int = 8
    memory: float = 4.0

    def __post_init__(self):
        if sorted(set(self.choices)) != list(self.choices) or not set(self.choices) <= set(BITS):
            raise ValueError(f"choices {self.choices} are not some bits of 2 to 8, ascending")
        if not self.choices[0] <= self.average <= self.choices[-1]:
            raise ValueError(
                f"an average of {self.average} bits does not lie in {self.choices[0]} to {self.choices[-1]}"
            )


def sensitivities(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], plan: MixedPrecision, *,
    fit=None, ranges: Ranges | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What rounding the weight of every linear layer costs the prediction, at each of the choices.

    At the scheme's own bits that is measured: the layer's weight alone is rounded, the model runs. At other bits it is
    taken to grow as the error of the layer's own output does, which follows from second moments of its inputs. Nothing
    is compiled anew for a layer.

    Args:
        model: A float model, left as it is.
        schemes: One a layer and block, by name in diffusers.
        batches: Keyword arguments of the model's call.
        plan: Choices and inputs.
        fit, ranges: As `qvdjax.ptq.apply_schemes` takes them.

    Returns:
        By name, [choices]: squared error of the prediction relative to its square.
    """
    weights = quantized_weights(model, schemes)
    examples = _spread(batches, plan.inputs)
    exact = [_predict(model, inputs) for inputs in examples]
    size = sum(float(jnp.square(one).sum()) for one in exact)
    places = {name: (path, i) for names, path, _ in layers_of(model, (Linear,)) for i, name in enumerate(names)}
    costs = {}
    for some in passes(model, weights, plan.memory):
        for name, moment in second_moments(model, batches, some):
            edges = (ranges or {}).get(name)
            own, error = _costs(weights[name](), edges, moment, scheme=schemes[name], fit=fit, choices=plan.choices)
            changed = _with_error(model, *places[name], error)
            misses = (_predict(changed, inputs) - wanted for inputs, wanted in zip(examples, exact, strict=True))
            effect = sum(float(jnp.square(miss).sum()) for miss in misses) / size
            costs[name] = effect * np.asarray(own)
    return costs


def _spread(batches: Iterable[Mapping[str, jax.Array]], count: int) -> list[dict[str, np.ndarray]]:
    """So many rows of all batches, evenly spread, one each."""
    rows = [(batch, i) for batch in batches for i in range(len(batch["latents"]))]
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [{name: np.asarray(a)[i : i + 1] for name, a in batch.items()} for batch, i in (rows[n] for n in chosen)]


@jax.jit
def _predict(model: VideoModel, inputs: Mapping[str, jax.Array]) -> jax.Array:
    return model(**inputs)


def _with_error(model: VideoModel, path: tuple, number: int, error: jax.Array) -> VideoModel:
    """The model with an error [out, in] added to one weight, in one block where it is one of a stack."""
    model = shallow_copy(model)
    layer = at(model, path)
    value = layer.weight[...]
    row = number if value.ndim > error.ndim else ...
    layer.weight = layer.weight.replace(value.at[row].add(error.astype(value.dtype)))
    return model


@functools.partial(jax.jit, static_argnames=("scheme", "fit", "choices"))
def _costs(weight, input_range, moment, *, scheme: LayerScheme, fit, choices: tuple[int, ...]):
    """Squared errors of a layer's output at the choices relative to that at the scheme's own bits [choices], and the
    error of the weight [out, in] at those."""
    prepared = prepare_weight(weight, input_range, moment, None, scheme=scheme, fit=fit)
    rest = prepared.whole - prepared.taken

    def error(bits):
        quantizer = dataclasses.replace(scheme.weight, bits=bits)
        return encode(rest, quantizer.grid, *quantizer.scale_of(rest)).dequantize() - rest

    def energy(bits):
        e = error(bits)
        return (jnp.matmul(e, prepared.moment, precision=jax.lax.Precision.HIGHEST) * e).sum()

    own = energy(scheme.weight.bits)
    costs = jnp.stack([energy(bits) for bits in choices]) / jnp.where(own > 0, own, 1)
    found = error(scheme.weight.bits)
    if scheme.transforms:
        # With x' = x T the layer's error x' E^T is x (E T^T)^T; T is what the transform makes of the identity.
        transform = InputTransform.of(scheme, prepared.arrays["transform"])
        identity = jnp.eye(weight.shape[-1], dtype=found.dtype)
        found = jnp.matmul(found, transform(identity).T, precision=jax.lax.Precision.HIGHEST)
    return costs, found


def allocate(costs: Mapping[str, np.ndarray], sizes: Mapping[str, int], plan: MixedPrecision) -> dict[str, int]:
    """Bits of every layer: all begin at the fewest, and the step that saves most for its bits is taken next, as
    long as the average allows.

    The sum of costs is what falls; a step may be of several bits, since one may save little and the next
    much.

    Args:
        costs: See `sensitivities`.
        sizes: Weights of each layer.
        plan: Choices and average.
    """
    left = plan.average * sum(sizes[name] for name in costs) - plan.choices[0] * sum(sizes[name] for name in costs)
    chosen = dict.fromkeys(costs, 0)  # numbers of choices

    def best_step(name: str) -> tuple[float, str, int, int] | None:
        now, steps = chosen[name], []
        for later in range(now + 1, len(plan.choices)):
            bits = (plan.choices[later] - plan.choices[now]) * sizes[name]
            steps.append((-(costs[name][now] - costs[name][later]) / bits, name, now, later))
        return min(steps, default=None)

    queue = [step for name in costs if (step := best_step(name))]
    heapq.heapify(queue)
    while queue:
        gain, name, now, later = heapq.heappop(queue)
        if chosen[name] != now or gain >= 0:
            continue
        bits = (plan.choices[later] - plan.choices[now]) * sizes[name]
        if bits > left:
            if later > now + 1:  # a smaller step may fit
                smaller = (plan.choices[now + 1] - plan.choices[now]) * sizes[name]
                gain = -(costs[name][now] - costs[name][now + 1]) / smaller
                heapq.heappush(queue, (gain, name, now, now + 1))
            continue
        chosen[name], left = later, left - bits
        if step := best_step(name):
            heapq.heappush(queue, step)
    return {name: plan.choices[number] for name, number in chosen.items()}


def with_mixed_precision(
    model: VideoModel, schemes: Mapping[str, Any], batches: Iterable[Mapping[str, jax.Array]], plan: MixedPrecision, *,
    fit=None, ranges: Ranges | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The schemes with bits of their weights shared out; the arguments are those of `sensitivities`.

    Raises:
        UserError: No linear layer's weight is quantized.
    """
    costs = sensitivities(model, schemes, batches, plan, fit=fit, ranges=ranges)
    if not costs:
        raise UserError("the recipe quantizes no linear layer", remedy="leave `average_bits` out")
    shapes = {name: shape_of(layer.weight)[-2:] for names, _, layer in layers_of(model, (Linear,)) for name in names}
    bits = allocate(costs, {name: int(np.prod(shapes[name])) for name in costs}, plan)
    changed = dict(schemes)
    for name, number in bits.items():
        scheme = schemes[name]
        weight = dataclasses.replace(scheme.weight, bits=number)
        changed[name] = dataclasses.replace(scheme, weight=weight, reason=f"{scheme.reason}; bits by what they cost it")
    return changed
