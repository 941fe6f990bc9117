"""Attention modules that say where their values come from and go to."""

from typing import ClassVar

from flax import nnx


class CarriesValues(nnx.Module):
    """An attention that does nothing to values but average them over tokens, each head's features on their own.

    An orthogonal matrix on each head's features of the values is then the same as one on the inputs of the output
    layers, and can be put into the weights of both (`qvdjax.ptq.absorb`). A family whose values are normalised or
    gated in between, or reach other layers too, must not claim this.

    Attributes:
        heads: Number of heads; features of the value layers' outputs are (heads, features of a head).
        value_layers, output_layers: Paths of the linear layers, from this module: all that make values, and all
            that read their averages.
    """

    heads: int
    value_layers: ClassVar[tuple[tuple, ...]] = (("to_v",),)
    output_layers: ClassVar[tuple[tuple, ...]] = (("to_out", "0"),)
