"""Low-rank adapters inside the quantizer: Q(W + B A), where A, B and the quantizer alone are trained (EfficientDM)."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn import Param, VideoModel
from qvdjax.nn.variables import Scale, shallow_copy
from qvdjax.qat.learned_linear import rounded_layers


class AdapterFactor(Param):
    """One of the two factors of an adapter, float32, in units of the weight's mean step size."""


class Adapter(nnx.Module):
    """B A of rank at most r, added to a weight before it is rounded (EfficientDM, arXiv 2310.03270).

    The source trains A and B of each layer at a rate in proportion to the mean step size of its weight, because what
    moves a coarse grid's codes would jump over a fine one's. Here the factors are held in units of that size, and an
    optimizer whose steps do not depend on the gradient's size (Adam) needs one rate for all layers.

    Attributes:
        left: B / size, [..., out, rank]; begins at zero, so that nothing changes.
        right: A / size, [..., rank, in]; begins uniform within 1 / sqrt(in), as LoRA's published code has it.
        size: Mean step size of the weight at the start, [..., 1, 1]; not trained.
    """

    def __init__(self, left: jax.Array, right: jax.Array, size: jax.Array, *, axes: tuple):
        """`axes` names the two axes of the weight [out, in]; a leading axis of layers has no name."""
        self.left = AdapterFactor(left.astype(jnp.float32), axes=(axes[0], None), keep_float32=True)
        self.right = AdapterFactor(right.astype(jnp.float32), axes=(None, axes[1]), keep_float32=True)
        self.size = Scale(size.astype(jnp.float32), axes=(None, None))

    def weight(self) -> jax.Array:
        """B A, float32 [..., out, in]."""
        return jnp.matmul(self.left[...] * self.size[...], self.right[...] * self.size[...])


def adapter(shape: tuple[int, ...], scale: jax.Array, rank: int, *, axes: tuple, key: jax.Array) -> Adapter:
    """An adapter as it begins.

    Args:
        shape: Of the weight, [..., out, in].
        scale: Its step sizes, [..., out or 1, groups].
        rank: Columns of B, 1 or more.
        axes: Logical names of the weight's two axes.
        key: Of A.

    Raises:
        UserError: A rank below 1.
    """
    if rank < 1:
        raise UserError(f"an adapter of rank {rank}", remedy="give a rank of at least 1")
    *lead, rows, columns = shape
    size = scale.mean(axis=(-2, -1), keepdims=True)  # [..., 1, 1]
    right = jax.random.uniform(key, (*lead, rank, columns), minval=-1, maxval=1) / jnp.sqrt(columns)
    return Adapter(jnp.zeros((*lead, rows, rank)), right / size, size, axes=axes)


def with_adapters(model: VideoModel, rank: int, *, key: jax.Array | None = None) -> VideoModel:
    """The model with an adapter in every LearnedLinear whose weight is rounded; it computes what it did.

    Args:
        model: Left as it is.
        rank: Of each.
        key: See `rounded_layers`.

    Raises:
        UserError: A rank below 1.
    """
    model = shallow_copy(model)
    for layer, own in rounded_layers(model, key):
        layer.adapter = adapter(layer.weight[...].shape, layer.weight_scale[...], rank, axes=layer.axes, key=own)
    return model
