"""Phi in a model: put beside every rounded weight, gated in each call, and taken away again."""

from collections.abc import Iterator

import jax

from qvdjax.nn import VideoModel, for_one_call
from qvdjax.nn.variables import iterate, shallow_copy
from qvdjax.qat import phi
from qvdjax.qat.learned_linear import LearnedLinear, rounded_layers


def with_low_rank(
    model: VideoModel, rank: int, *, start: phi.Start = "svd", key: jax.Array | None = None
) -> VideoModel:
    """The model with a low-rank module in every LearnedLinear whose weight is rounded, made of what rounding leaves.

    Args:
        model: Left as it is.
        rank: Columns of each module.
        start: See `qvdjax.qat.phi.low_rank`.
        key: Of what is random there, see `rounded_layers`.

    Raises:
        UserError: See `qvdjax.qat.phi.low_rank`.
    """
    model = shallow_copy(model)
    for layer, own in rounded_layers(model, key):
        layer.auxiliary = phi.low_rank(_residual(layer), rank, axes=layer.axes, start=start, key=own)
    return model


def with_gamma(model: VideoModel, gamma: jax.Array) -> VideoModel:
    """The model with `gamma` in every layer that has an auxiliary module, for one call.

    Args:
        model: Left as it is.
        gamma: [rank], the same for all layers, see `qvdjax.qat.rank_decay`.
    """
    model = shallow_copy(model)
    for path, layer in _with_auxiliary(model):
        layer.gamma = for_one_call(model, path, gamma)
    return model


def without_auxiliary(model: VideoModel) -> VideoModel:
    """The model without auxiliary modules, as their last gamma, all zeros, leaves it."""
    model = shallow_copy(model)
    for _, layer in _with_auxiliary(model):
        del layer.auxiliary
    return model


@jax.jit
def _residual(layer: LearnedLinear) -> jax.Array:
    """W - Q(W) of a layer or a stack, without temporaries of that size."""
    return layer.weight[...] - layer.rounded_weight()


def _with_auxiliary(model: VideoModel) -> Iterator[tuple[tuple, LearnedLinear]]:
    yield from ((path, layer) for path, layer in iterate(model, LearnedLinear) if layer.auxiliary is not None)
