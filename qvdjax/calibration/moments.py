"""Second moments of every input of linear layers, over a calibration set."""

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping

import jax
import jax.numpy as jnp

from qvdjax.calibration.watching import Kept, Watcher, by_layer, observe
from qvdjax.errors import UserError
from qvdjax.nn import Linear, Statistic, VideoModel, layers_of, swap_layers
from qvdjax.nn.variables import shape_of


class Moments(Watcher):
    """A linear layer that keeps X^T X of its last call.

    Attributes:
        moment: [in, in] float32, summed over all tokens.
    """

    def __init__(self, layer: Linear):
        super().__init__(layer)
        *leading, _, width = shape_of(layer.weight)
        self.moment = Statistic(jnp.zeros((*leading, width, width), jnp.float32), axes=(None, None))

    def observe(self, x: jax.Array) -> None:
        """x [..., in]."""
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)  # [..., in] -> [tokens, in]
        self.moment[...] = jnp.matmul(rows.T, rows, precision=jax.lax.Precision.HIGHEST)


def passes(model: VideoModel, names: Collection[str], memory: float) -> list[list[str]]:
    """The linear layers among `names` (in diffusers), cut into lists whose second moments take at most `memory` GiB.

    A layer of n inputs takes 4 n**2 bytes in each block; one that alone takes more is a list of its own.
    """
    lists, left = [], 0.0
    for found, _, layer in layers_of(model, (Linear,)):
        size = 4 * shape_of(layer.weight)[-1] ** 2
        for name in found:
            if name not in names:
                continue
            if not lists or size > left:
                lists.append([])
                left = memory * 2**30
            lists[-1].append(name)
            left -= size
    return lists


@functools.partial(jax.jit, donate_argnums=0)
def _add(totals: Kept, model: VideoModel, inputs: Mapping[str, jax.Array]) -> Kept:
    return jax.tree.map(jnp.add, totals, observe(model, inputs))


def second_moments(
    model: VideoModel, batches: Iterable[Mapping[str, jax.Array]], names: Collection[str]
) -> Iterator[tuple[str, jax.Array]]:
    """Second moments X^T X of the inputs of some layers, summed over the tokens of all batches.

    Args:
        model: A float model, on one device or sharded. Left as it is.
        batches: Keyword arguments of the model's call: latents, timestep, context and further conditions.
        names: Of linear layers in diffusers. The moments of all of them are in memory at once (`passes`).

    Yields:
        Name and [in, in] float32.

    Raises:
        UserError: No batch at all, or moments that are not finite.
    """
    watched = swap_layers(model, dict.fromkeys(names, True), lambda layer, *_: Moments(layer))
    for name, kept in summed(watched, batches):
        yield name, kept["moment"]


def summed(watched: VideoModel, batches: Iterable[Mapping[str, jax.Array]]) -> Iterator[tuple[str, dict]]:
    """What the watchers of matrices in a model kept, summed over all batches: a layer's name, and [in, in] each.

    Raises:
        UserError: No batch at all, or values that are not finite.
    """
    totals = None
    for inputs in batches:
        inputs = dict(inputs)
        if totals is None:
            shapes = jax.eval_shape(observe, watched, inputs)
            totals = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        totals = _add(totals, watched, inputs)
    if totals is None:
        raise UserError("the calibration set is empty", remedy="make one with `qvdjax calibrate`")
    for found, kept in by_layer(watched, totals):
        # ([layers,] in in) -> layers in in
        rows = {part: a.reshape(len(found), *a.shape[-2:]) for part, a in kept.items()}
        for i, name in enumerate(found):
            own = {part: a[i] for part, a in rows.items()}  # iterating over what other processes hold is not possible
            if not all(bool(jnp.isfinite(jnp.diagonal(a)).all()) for a in own.values()):
                raise UserError(
                    "calibration met values that are not finite", remedy="check the calibration set", items=[name]
                )
            yield name, own
