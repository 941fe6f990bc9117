"""Layers that keep a statistic of what they are called with."""

import jax
from flax import nnx

from qvdjax.nn import Conv, Linear


class Watcher(nnx.Module):
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

    @property
    def weight(self):
        """The layer's weight, which some models read for its dtype."""
        return self.layer.weight

    @property
    def bias(self):
        """The layer's bias, likewise: quantized layers have one too."""
        return self.layer.bias
