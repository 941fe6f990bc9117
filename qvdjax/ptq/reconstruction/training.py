"""One block is trained towards its full-precision outputs: a jitted pass over a chunk, the same for all blocks."""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qvdjax.nn import LayerScheme, Linear, VideoModel
from qvdjax.nn.variables import dotted, iterate, replace, shallow_copy
from qvdjax.ptq.reconstruction.examples import Examples
from qvdjax.ptq.reconstruction.learned_transform import Learned
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.reconstructed_linear import LearnedClip, ReconstructedLinear


def prepared(
    block: nnx.Module, schemes: Mapping[str, LayerScheme], fit, ranges: Mapping[str, tuple | None]
) -> nnx.Module:
    """A copy of a float block whose layers with transforms or input clips are trained.

    Others, such as modulation layers, which see one vector a step, stay float.

    Args:
        block: One block, without a layer axis.
        schemes: By a layer's path in the block.
        fit: What transforms start as (`qvdjax.ptq.transforms`), None without.
        ranges: Smallest and largest input of each channel, by path; None for those that no calibration saw.
    """
    block = shallow_copy(block)
    for path, layer in iterate(block, Linear):
        scheme = schemes.get(dotted(path))
        if scheme is None or not (scheme.transforms or scheme.input_clip):
            continue
        scheme.check_width(layer.weight[...].shape[-1])
        start = None
        if scheme.transforms:
            low, high = ranges.get(dotted(path)) or (None, None)
            start = _fitted(layer.weight[...], low, high, fit=fit)
        replace(block, path, ReconstructedLinear(layer, scheme, start))
    return block


@jax.jit(static_argnames="fit")
def _fitted(weight, low, high, *, fit):
    return fit.fit(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), low, high)


def optimizer(plan: Reconstruction, steps: int) -> optax.GradientTransformation:
    """AdamW with a cosine for each of the two rates."""

    def adamw(rate):
        return optax.adamw(optax.cosine_decay_schedule(rate, steps, plan.final_rate), weight_decay=plan.weight_decay)

    def label(learned):
        return jax.tree.map(
            lambda v: "clip" if isinstance(v, LearnedClip) else "transform", learned,
            is_leaf=lambda v: isinstance(v, nnx.Variable),
        )  # fmt: skip

    return optax.multi_transform({"clip": adamw(plan.clip_rate), "transform": adamw(plan.rate)}, label)


@jax.jit(static_argnames=("plan", "steps"))
def start(block: nnx.Module, *, plan: Reconstruction, steps: int) -> tuple[nnx.State, optax.OptState]:
    """What is trained in a prepared block, and the optimizer's state, on the block's devices."""
    learned = nnx.state(block, Learned)
    return learned, optimizer(plan, steps).init(learned)


@functools.partial(jax.jit, static_argnames=("plan", "steps"), donate_argnums=0)
def train(
    state: tuple[nnx.State, optax.OptState], block: nnx.Module, outer: VideoModel, examples: Examples, *,
    plan: Reconstruction, steps: int,
) -> tuple[nnx.State, optax.OptState]:  # fmt: skip
    """One step for each example of a chunk, in their order.

    Args:
        state: See `start`.
        block: Prepared; what is trained of it is taken from the state.
        outer: The model without its blocks.
        examples: See `Examples`.
        plan: How.
        steps: In all epochs together.
    """
    graph, _, frozen = nnx.split(block, Learned, ...)
    move = optimizer(plan, steps).update

    def step(state, example: Examples):
        learned, optimizer_state = state

        def loss(learned):
            error = weighted_error(nnx.merge(graph, learned, frozen), outer, example)
            return error / jax.lax.stop_gradient(jnp.maximum(error, 1e-30)) if plan.relative else error

        updates, optimizer_state = move(jax.grad(loss)(learned), optimizer_state, learned)
        return (optax.apply_updates(learned, updates), optimizer_state), None

    return jax.lax.scan(step, state, examples)[0]


def weighted_error(block: nnx.Module, outer: VideoModel, example: Examples) -> jax.Array:
    """Mean over tokens of weight x squared error of a block's output (S2Q-VDiT, equation 10), at least float32."""
    _, conditioning = outer.embed(**example.inputs)
    return _weighed(block(example.stream, conditioning) - example.target, example.weights)


def _weighed(difference: jax.Array, weights: jax.Array) -> jax.Array:
    wide = difference.astype(jnp.promote_types(difference.dtype, jnp.float32))
    return (jnp.square(wide).mean(axis=-1) * weights).mean()


@jax.jit
def relative_error(block: nnx.Module, outer: VideoModel, examples: Examples) -> tuple[jax.Array, jax.Array]:
    """Weighted squared error of a block over a chunk, and the weighted square of what it should change."""

    def one(example: Examples):
        change = _weighed(example.target - example.stream, example.weights)
        return weighted_error(block, outer, example), change

    errors, squares = jax.lax.map(one, examples)
    return errors.sum(), squares.sum()
