"""One block is trained towards its full-precision outputs: a jitted pass over a chunk, the same for all blocks."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qvdjax.nn import LayerScheme, Linear, VideoModel
from qvdjax.nn.variables import dotted, iterate, replace, shallow_copy
from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptivelyRoundedWeight, RoundingLogits
from qvdjax.ptq.reconstruction.examples import Examples
from qvdjax.ptq.reconstruction.flattened_weight import FlattenedWeight, LearnedClip
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear

State = tuple[nnx.State, optax.OptState, jax.Array]
"""What is trained, the optimizer's state, and how many steps are done."""


def prepared(
    block: nnx.Module, schemes: Mapping[str, LayerScheme], fit, ranges: Mapping[str, tuple | None],
    edges: Mapping[str, tuple | None], plan: Reconstruction,
) -> nnx.Module:  # fmt: skip
    """A copy of a float block in which the layers that a plan trains are set up for it.

    Where rounding is trained these are all whose weight is quantized, else those with transforms or input clips; then
    others, such as modulation layers, which see one vector a step, stay float.

    Args:
        block: One block, without a layer axis.
        schemes: By a layer's path in the block.
        fit: What transforms start as (`qvdjax.ptq.transforms`), None without.
        ranges: Smallest and largest input of each channel, by path; None for those that no calibration saw.
        edges: Smallest and largest value of static ranges of inputs, by path; where there are none, ranges are empty.
        plan: What is trained.
    """
    block = shallow_copy(block)
    for path, layer in iterate(block, Linear):
        scheme = schemes.get(dotted(path))
        if scheme is None or not _trained(scheme, plan):
            continue
        weight = layer.weight[...]
        scheme.check_width(weight.shape[-1])
        start = None
        if scheme.transforms:
            low, high = ranges.get(dotted(path)) or (None, None)
            start = _fitted(weight, low, high, fit=fit)
        if plan.rounding is None:
            operands = FlattenedWeight(weight, scheme, start)
        else:
            operands = AdaptivelyRoundedWeight(weight, scheme, start, layer.axes)
        replace(block, path, ReconstructedLinear(layer, scheme, operands, edges.get(dotted(path)) or (0.0, 0.0)))
    return block


def _trained(scheme: LayerScheme, plan: Reconstruction) -> bool:
    if plan.rounding is not None:
        return scheme.weight is not None
    return bool(scheme.transforms or scheme.input_clip)


@jax.jit(static_argnames="fit")
def _fitted(weight, low, high, *, fit):
    return fit.fit(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high)


def optimizer(plan: Reconstruction, steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine for the rates of transforms and clips, Adam with a constant one for roundings."""

    def adamw(rate):
        return optax.adamw(optax.cosine_decay_schedule(rate, steps, plan.final_rate), weight_decay=plan.weight_decay)

    def kind(variable) -> str:
        names = {LearnedClip: "clip", RoundingLogits: "rounding"}
        return next((name for kind, name in names.items() if isinstance(variable, kind)), "transform")

    def label(learned):
        return jax.tree.map(kind, learned, is_leaf=lambda v: isinstance(v, nnx.Variable))

    optimizers = {"clip": adamw(plan.clip_rate), "transform": adamw(plan.rate)}
    if plan.rounding is not None:
        optimizers["rounding"] = optax.adam(plan.rounding.rate)
    return optax.multi_transform(optimizers, label)


@jax.jit(static_argnames=("plan", "steps"))
def start(block: nnx.Module, *, plan: Reconstruction, steps: int) -> State:
    """What is trained in a prepared block before any step, on the block's devices."""
    learned = nnx.state(block, Learned)
    return learned, optimizer(plan, steps).init(learned), jnp.zeros((), jnp.int32)


@functools.partial(jax.jit, static_argnames=("plan", "steps"), donate_argnums=0)
def train(
    state: State, block: nnx.Module, outer: VideoModel, examples: Examples, change: jax.Array, *,
    plan: Reconstruction, steps: int,
) -> State:  # fmt: skip
    """One step for each example of a chunk, in their order.

    Args:
        state: See `start`.
        block: Prepared; what is trained of it is taken from the state.
        outer: The model without its blocks.
        examples: See `Examples`.
        change: [], mean square of what the full-precision block changes of the stream.
        plan: How.
        steps: In all epochs together.
    """
    graph, _, frozen = nnx.split(block, Learned, ...)
    move = optimizer(plan, steps).update

    def step(state, example: Examples):
        learned, optimizer_state, done = state

        def loss(learned):
            student = nnx.merge(graph, learned, frozen)
            error = weighted_error(student, outer, example, plan.power)
            unit = error if plan.unit == "error" else change ** (plan.power / 2)
            relative = error / jax.lax.stop_gradient(jnp.maximum(unit, 1e-30))
            if plan.rounding is None:
                return relative
            return relative + plan.rounding.penalty_of(student, done / steps) / example.target.shape[-1]

        updates, optimizer_state = move(jax.grad(loss)(learned), optimizer_state, learned)
        return (optax.apply_updates(learned, updates), optimizer_state, done + 1), None

    return jax.lax.scan(step, state, examples)[0]


def weighted_error(block: nnx.Module, outer: VideoModel, example: Examples, power: float = 2.0) -> jax.Array:
    """Mean over tokens of weight x squared error of a block's output (S2Q-VDiT, equation 10), at least float32; of
    another power of it, if asked for."""
    _, conditioning = outer.embed(**example.inputs)
    return _weighed(block(example.stream, conditioning) - example.target, example.weights, power)


def _weighed(difference: jax.Array, weights: jax.Array, power: float = 2.0) -> jax.Array:
    wide = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    size = jnp.square(wide) if power == 2 else jnp.abs(wide) ** power
    return (size.mean(axis=-1) * weights).mean()


@jax.jit
def relative_error(block: nnx.Module, outer: VideoModel, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of a block over a chunk, and the weighted square of what it should change."""

    def one(example: Examples):
        change = _weighed(example.target - example.stream, example.weights)
        return weighted_error(block, outer, example), change

    errors, squares = jax.lax.map(one, examples)
    return errors.sum(), squares.sum()
