"""One block is trained towards its full-precision outputs: a jitted pass over a chunk, the same for all blocks."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Conv, LayerScheme, Linear, Statistic, VideoModel
from qvdjax.nn.partial_block import Arrays
from qvdjax.nn.variables import at, dotted, iterate, replace, shallow_copy
from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptivelyRoundedWeight, RoundingLogits
from qvdjax.ptq.reconstruction.examples import Examples, made
from qvdjax.ptq.reconstruction.flattened_weight import FlattenedWeight, LearnedClip
from qvdjax.ptq.reconstruction.known import Known, flat_weight
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.reconstructed_conv import ReconstructedConv
from qvdjax.ptq.reconstruction.reconstructed_layer import ReconstructedLayer
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear
from qvdjax.ptq.reconstruction.temporal import temporal_divergence
from qvdjax.ptq.reconstruction.token_estimation import FrameStatistics, LearnedEstimator, LearnedStep, SteppedWeight

State = tuple[nnx.State, optax.OptState, jax.Array]
"""What is trained, the optimizer's state, and how many steps are done."""


def prepared(
    block: nnx.Module, schemes: Mapping[str, LayerScheme], fit, known: Mapping[str, Known], plan: Reconstruction
) -> nnx.Module:
    """A copy of a float block in which the layers that a plan trains are set up for it.

    Where rounding is trained these are all whose weight is quantized, where estimates are those that have one, else
    linear layers with transforms or input clips. Layers that are known to be done are in their places; others, such as
    modulation layers, whose input is one vector a step, stay float.

    Args:
        block: One block, without a layer axis.
        schemes: By a layer's path in the block.
        fit: What transforms start as (`qvdjax.ptq.transforms`), None without.
        known: What calibration found, by path.
        plan: What is trained.
    """
    block = shallow_copy(block)
    for path, layer in iterate(block, (Linear, Conv)):
        scheme, found = schemes.get(dotted(path)), known.get(dotted(path), Known())
        if found.done is not None:
            replace(block, path, found.done)
        elif scheme is not None and _trained(scheme, plan, layer):
            replace(block, path, prepared_layer(layer, scheme, fit, found, plan))
    return block


def prepared_layer(
    layer: Linear | Conv, scheme: LayerScheme, fit, known: Known, plan: Reconstruction
) -> ReconstructedLayer:
    """A layer set up for what a plan trains of it; arguments as of `prepared`.

    Raises:
        ValueError: A plan that trains roundings, for a scheme with a low-rank branch.
    """
    weight, positions = flat_weight(layer), math.prod(getattr(layer, "kernel", ()))
    scheme.check_width(weight.shape[-1])
    start = known.transform(weight, scheme, fit, positions)
    if plan.rounding is not None:
        if scheme.low_rank is not None:
            raise ValueError("roundings are trained of a whole weight, not of what a low-rank branch leaves of it")
        operands = AdaptivelyRoundedWeight(weight, scheme, start, layer.axes, positions)
        kind = ReconstructedConv if isinstance(layer, Conv) else ReconstructedLinear
        return kind(layer, scheme, operands, known, start)
    estimator = None
    if plan.estimation is not None:
        operands = SteppedWeight(weight, scheme, start, layer.axes)
        estimator = LearnedEstimator(weight.shape, scheme.estimator, plan.estimation, layer.axes)
    else:
        operands = FlattenedWeight(weight, scheme, start)
    return ReconstructedLinear(layer, scheme, operands, known, start, estimator)


def _trained(scheme: LayerScheme, plan: Reconstruction, layer: Linear | Conv) -> bool:
    if plan.rounding is not None:
        return scheme.weight is not None
    if isinstance(layer, Conv):
        return False
    if plan.estimation is not None:
        return scheme.estimator is not None
    return bool(scheme.transforms or scheme.input_clip)


def optimizer(plan: Reconstruction, steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine for the rates of transforms and clips, Adam with a constant one for roundings."""

    def adamw(rate):
        return optax.adamw(optax.cosine_decay_schedule(rate, steps, plan.final_rate), weight_decay=plan.weight_decay)

    def kind(variable) -> str:
        names = {LearnedClip: "clip", LearnedStep: "clip", RoundingLogits: "rounding"}
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
        change: [], mean square of what the full-precision block changes of the stream (`changes`).
        plan: How.
        steps: In all epochs together.
    """
    graph, _, frozen = nnx.split(block, Learned, ...)
    move = optimizer(plan, steps).update

    def step(state, example: Examples):
        learned, optimizer_state, done = state

        def loss(learned):
            student = nnx.merge(graph, learned, frozen)
            # All blocks together would keep the inside of each.
            how = {"remat": True} if plan.scope == "model" else {}
            found, conditioning = made(student, outer, example.inputs, example.part, **how)
            error = _error(found, example.target, example.weights, plan.power)
            unit = error if plan.unit == "error" else change ** (plan.power / 2)
            relative = error / jax.lax.stop_gradient(jnp.maximum(unit, 1e-30))
            if plan.temporal:
                relative += plan.temporal * _between_frames(outer, found, example.target, conditioning)
            if plan.rounding is None:
                return relative
            channels = sum(a.shape[-1] for a in jax.tree.leaves(example.target))
            return relative + plan.rounding.penalty_of(student, done / steps) / channels

        updates, optimizer_state = move(jax.grad(loss)(learned), optimizer_state, learned)
        return (optax.apply_updates(learned, updates), optimizer_state, done + 1), None

    return jax.lax.scan(step, state, examples)[0]


def _between_frames(outer: VideoModel, found: Arrays, target: Arrays, conditioning) -> jax.Array:
    """How differently frames resemble each other in what a block makes and in what it should make."""
    frames = outer.token_frames(conditioning)
    if frames is None:
        raise UserError("this model does not say which tokens are a frame's", remedy="set temporal to 0: no such loss")
    video = outer.video_tokens(target[0].shape[1], conditioning)
    return temporal_divergence(found[0][:, video], target[0][:, video], frames)


def _error(found: Arrays, wanted: Arrays, weights: Arrays, power: float = 2.0) -> jax.Array:
    """Mean over the arrays that a block makes, all alike, of their weighted differences."""
    each = jax.tree.map(lambda a, b, w: _weighed(a - b, w, power), found, wanted, weights)
    return jnp.stack(jax.tree.leaves(each)).mean()


def _weighed(difference: jax.Array, weights: jax.Array, power: float = 2.0) -> jax.Array:
    """Mean over tokens of weight x squared difference (S2Q-VDiT, equation 10), at least float32; of another power of
    it, if asked for."""
    wide = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    size = jnp.square(wide) if power == 2 else jnp.abs(wide) ** power
    return (size.mean(axis=-1) * weights).mean()


def changes(part: Arrays, results: Arrays) -> Arrays:
    """What a block changes: what it makes, less the first array that it reads where that has the same shape.

    Behind another resolution or width nothing of a stream is left to compare with: all of it is new.
    """
    first = jax.tree.leaves(part)[0]
    return jax.tree.map(lambda a: a - first if a.shape == first.shape else a, results)


@jax.jit
def relative_error(block: nnx.Module, outer: VideoModel, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of a block over a chunk, and the weighted square of what it should change."""

    def one(example: Examples):
        found, _ = made(block, outer, example.inputs, example.part)
        error = _error(found, example.target, example.weights)
        changed = changes(example.part, example.target)
        return error, _error(changed, jax.tree.map(jnp.zeros_like, changed), example.weights)

    errors, squares = jax.lax.map(one, examples)
    return errors.sum(), squares.sum()


@jax.jit
def frame_statistics(block: nnx.Module, outer: VideoModel, examples: Examples) -> dict[str, dict[str, jax.Array]]:
    """Of every layer with gains of frames, by its path: sums over a chunk of `similarity` and `share`, [frames] each
    (see `FrameStatistics`)."""
    watched = shallow_copy(block)
    paths = [path for path, layer in iterate(block, ReconstructedLinear) if has_gains(layer)]
    for path in paths:
        replace(watched, path, FrameStatistics(at(watched, path)))

    def one(example: Examples):
        own = jax.tree.map(lambda a: a, watched)  # may be written to in the loop
        made(own, outer, example.inputs, example.part)
        return {dotted(path): nnx.to_pure_dict(nnx.state(at(own, path), Statistic)) for path in paths}

    return jax.tree.map(lambda a: a.sum(axis=0), jax.lax.map(one, examples))


def has_gains(layer: ReconstructedLinear) -> bool:
    """Whether a layer's estimate has a gain for each frame."""
    return layer.estimator is not None and layer.estimator.gain is not None
