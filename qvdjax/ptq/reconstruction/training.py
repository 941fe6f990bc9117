"""One block is trained towards its full-precision outputs: a jitted pass over a chunk, the same for all blocks."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import LayerScheme, Linear, Statistic, VideoModel
from qvdjax.nn.variables import at, dotted, iterate, replace, shallow_copy
from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptivelyRoundedWeight, RoundingLogits
from qvdjax.ptq.reconstruction.examples import Examples
from qvdjax.ptq.reconstruction.flattened_weight import FlattenedWeight, LearnedClip
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.reconstructed_linear import ReconstructedLinear
from qvdjax.ptq.reconstruction.temporal import temporal_divergence
from qvdjax.ptq.reconstruction.token_estimation import FrameStatistics, LearnedEstimator, LearnedStep, SteppedWeight

State = tuple[nnx.State, optax.OptState, jax.Array]
"""What is trained, the optimizer's state, and how many steps are done."""


def prepared(
    block: nnx.Module, schemes: Mapping[str, LayerScheme], fit, ranges: Mapping[str, tuple | None],
    edges: Mapping[str, tuple | None], plan: Reconstruction,
) -> nnx.Module:  # fmt: skip
    """A copy of a float block in which the layers that a plan trains are set up for it.

    Where rounding is trained these are all whose weight is quantized, where estimates are those that have one, else
    those with transforms or input clips; then others, such as modulation layers, whose input is one vector a step, stay
    float.

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
        estimator = None
        if plan.rounding is not None:
            operands = AdaptivelyRoundedWeight(weight, scheme, start, layer.axes)
        elif plan.estimation is not None:
            operands = SteppedWeight(weight, scheme, start, layer.axes)
            estimator = LearnedEstimator(weight.shape, scheme.estimator, plan.estimation, layer.axes)
        else:
            operands = FlattenedWeight(weight, scheme, start)
        own = edges.get(dotted(path)) or (0.0, 0.0)
        replace(block, path, ReconstructedLinear(layer, scheme, operands, own, estimator))
    return block


def _trained(scheme: LayerScheme, plan: Reconstruction) -> bool:
    if plan.rounding is not None:
        return scheme.weight is not None
    if plan.estimation is not None:
        return scheme.estimator is not None
    return bool(scheme.transforms or scheme.input_clip)


@jax.jit(static_argnames="fit")
def _fitted(weight, low, high, *, fit):
    return fit.fit(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high)


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
            _, conditioning = outer.embed(**example.inputs)
            # All blocks together would keep the inside of each.
            how = {"remat": True} if plan.scope == "model" else {}
            out = student(example.stream, conditioning, **how)
            error = _weighed(out - example.target, example.weights, plan.power)
            unit = error if plan.unit == "error" else change ** (plan.power / 2)
            relative = error / jax.lax.stop_gradient(jnp.maximum(unit, 1e-30))
            if plan.temporal:
                video, frames = outer.video_tokens(out.shape[1], conditioning), outer.token_frames(conditioning)
                if frames is None:
                    raise UserError(
                        "this model does not say which tokens are a frame's", remedy="set temporal to 0: no such loss"
                    )
                relative += plan.temporal * temporal_divergence(out[:, video], example.target[:, video], frames)
            if plan.rounding is None:
                return relative
            return relative + plan.rounding.penalty_of(student, done / steps) / example.target.shape[-1]

        updates, optimizer_state = move(jax.grad(loss)(learned), optimizer_state, learned)
        return (optax.apply_updates(learned, updates), optimizer_state, done + 1), None

    return jax.lax.scan(step, state, examples)[0]


def _weighed(difference: jax.Array, weights: jax.Array, power: float = 2.0) -> jax.Array:
    """Mean over tokens of weight x squared difference (S2Q-VDiT, equation 10), at least float32; of another power of
    it, if asked for."""
    wide = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    size = jnp.square(wide) if power == 2 else jnp.abs(wide) ** power
    return (size.mean(axis=-1) * weights).mean()


@jax.jit
def relative_error(block: nnx.Module, outer: VideoModel, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of a block over a chunk, and the weighted square of what it should change."""

    def one(example: Examples):
        _, conditioning = outer.embed(**example.inputs)
        error = _weighed(block(example.stream, conditioning) - example.target, example.weights)
        return error, _weighed(example.target - example.stream, example.weights)

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
        _, conditioning = outer.embed(**example.inputs)
        own = jax.tree.map(lambda a: a, watched)  # may be written to in the loop
        own(example.stream, conditioning)
        return {dotted(path): nnx.to_pure_dict(nnx.state(at(own, path), Statistic)) for path in paths}

    return jax.tree.map(lambda a: a.sum(axis=0), jax.lax.map(one, examples))


def has_gains(layer: ReconstructedLinear) -> bool:
    """Whether a layer's estimate has a gain for each frame."""
    return layer.estimator is not None and layer.estimator.gain is not None
