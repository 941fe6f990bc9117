"""How large each input channel of a layer is, steps weighed by how little they resemble the weight (PTQ4DiT)."""

import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.calibration.watching import Kept, Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Linear, Statistic, VideoModel, layers_of
from qvdjax.nn.variables import leading_shape, own_shape, replace, shallow_copy
from qvdjax.parallel import to_host


def ranks(values: jax.Array) -> jax.Array:
    """Rank of each of the values [n], float32 from 0; equal values share the mean of theirs."""
    ordered = jnp.sort(values)
    first, behind = (jnp.searchsorted(ordered, values, side=side) for side in ("left", "right"))
    return (first + behind - 1).astype(jnp.float32) / 2


def spearman(a: jax.Array, b: jax.Array) -> jax.Array:
    """Spearman's rank correlation of a and b [n], in -1 to 1; 0 where all values of one are equal."""
    a, b = (one - one.mean() for one in (ranks(a), ranks(b)))
    size = jnp.sqrt((a * a).sum() * (b * b).sum())
    return jnp.where(size > 0, (a * b).sum() / jnp.where(size > 0, size, 1), 0)


class Salient(Watcher):
    """A linear layer that keeps how large its last input was, and how much that counts.

    Attributes:
        weighed: [in], e^-rho max|x| of each channel, over all other axes.
        share: [], e^-rho, with rho the rank correlation of the channels' max|x| with their max|w|.
    """

    def __init__(self, layer: Linear):
        super().__init__(layer)
        leading, (_, width) = leading_shape(layer.weight), own_shape(layer.weight)
        self.weighed = Statistic(jnp.zeros((*leading, width), jnp.float32), axes=(None,))
        self.share = Statistic(jnp.zeros(leading, jnp.float32), axes=())

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        inputs = jnp.abs(x).max(axis=tuple(range(x.ndim - 1))).astype(jnp.float32)  # ... in -> in
        weights = jnp.abs(self.layer.weight[...]).max(axis=0)  # out in -> in
        share = jnp.exp(-spearman(inputs, weights))
        self.weighed[...], self.share[...] = share * inputs, share


@jax.jit
def _observe(model: VideoModel, inputs: Mapping[str, jax.Array]) -> Kept:
    """Sums of what the layers keep of each row of a batch, as if it came alone."""
    rows = jax.tree.map(lambda a: a[:, None], dict(inputs))  # batch ... -> batch 1 ...
    own = functools.partial(jax.tree.map, lambda a: a)  # a model whose layers may be written to in the loop
    kept = jax.lax.map(lambda row: observe(own(model), row), rows)
    return jax.tree.map(lambda a: a.sum(axis=0), kept)


def input_saliences(model: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> dict[str, tuple]:
    """Spearman-guided salience of every linear layer's input channels (PTQ4DiT, arXiv 2405.16005).

    With s(X_t) the largest magnitude of each channel in the t-th model input, s(W) that in the weight, and rho_t the
    rank correlation of the two over channels, it is

        sum over t of eta_t s(X_t),  eta = softmax over t of -rho_t

    so that inputs count more whose heavy channels are not the weight's, which are those that balancing can help.

    Args:
        model: A float model, on one device or sharded.
        batches: Keyword arguments of the model's call. Each row, one step of one prompt in one guidance branch, is
            one t, as each sample of a calibration set is in the released code.

    Returns:
        Name of the layer in diffusers -> (-salience [in], salience [in]), NumPy float32: where ranges of channels are
        taken, as `qvdjax.calibration.ranges.input_ranges` gives them.

    Raises:
        UserError: No batch at all, or inputs that are not finite.
    """
    watched, total = shallow_copy(model), None
    for _, path, layer in layers_of(model, (Linear,)):
        replace(watched, path, Salient(layer))
    for inputs in batches:
        # rho is at most 1 in magnitude: nothing overflows, and sums of numerator and denominator are the softmax.
        new = jax.tree.map(lambda a: to_host(a).astype(np.float64), _observe(watched, inputs))
        total = new if total is None else jax.tree.map(np.add, total, new)
    if total is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    found = {}
    for names, kept in by_layer(watched, total):
        salience = (kept["weighed"] / kept["share"][..., None]).astype(np.float32)  # [layers,] in / [layers,] 1
        rows = salience.reshape(len(names), -1)  # ([layers,] in) -> layers in
        found.update((name, (-row, row)) for name, row in zip(names, rows, strict=True))
    if broken := [name for name, (_, salience) in found.items() if not np.isfinite(salience).all()]:
        raise UserError("calibration met values that are not finite", remedy="check the calibration set", items=broken)
    return found
