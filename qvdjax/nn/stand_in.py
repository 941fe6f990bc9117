"""A module in the place of a layer."""

from flax import nnx


class StandIn(nnx.Module):
    """Stands in a model where a layer stood, which it holds as `layer`."""

    layer: nnx.Module

    @property
    def weight(self):
        """The layer's weight, which some models read for its dtype."""
        return self.layer.weight

    @property
    def bias(self):
        """The layer's bias, likewise: quantized layers have one too."""
        return self.layer.bias
