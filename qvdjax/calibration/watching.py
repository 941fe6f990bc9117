"""Layers that keep a statistic of what they are called with."""

from collections.abc import Iterator, Mapping

import jax
from flax import nnx

from qvdjax.nn import Conv, Linear, StandIn, Statistic, VideoModel, layers_of

Kept = tuple[list[dict], list[dict]]
"""Statistics by name: of each watched layer outside stacks, and of each stack by the paths inside its block."""


class Watcher(StandIn):
    """A float layer, and what a subclass keeps of its inputs."""

    def __init__(self, layer: Linear | Conv):
        self.layer = layer

    def observe(self, x: jax.Array) -> None:
        """Keep what is to be known about x [..., in]."""
        raise NotImplementedError(f"{type(self).__name__} does not say what it keeps")

    def __call__(self, x: jax.Array) -> jax.Array:
        """As the layer."""
        self.observe(x)
        return self.layer(x)


def observe(model: VideoModel, inputs: Mapping[str, jax.Array]) -> Kept:
    """What the watchers of a model keep of one call; dead code but for them goes, under jit."""
    _, in_stacks = model.run(**inputs, collect=Statistic)
    outside = [
        nnx.to_pure_dict(nnx.state(layer, Statistic))
        for _, path, layer in layers_of(model, (Watcher,)) if path[0] != "stacks"
    ]  # fmt: skip
    return outside, [nnx.to_pure_dict(state) for state in in_stacks]


def by_layer(model: VideoModel, kept: Kept) -> Iterator[tuple[list[str], dict]]:
    """Names in diffusers, one a block, and the statistics of every watched layer; a stack's carry its layer axis."""
    outside, in_stacks = iter(kept[0]), kept[1]
    for names, path, _ in layers_of(model, (Watcher,)):
        if path[0] != "stacks":
            yield names, next(outside)
            continue
        node = in_stacks[path[1]]
        for part in path[3:]:
            node = node[part]
        yield names, node
