"""All layers of a model that a recipe decides about, under their names in diffusers."""

from collections.abc import Iterator

from flax import nnx

from qvdjax.nn.attention import Attention
from qvdjax.nn.conv import Conv, QuantizedConv
from qvdjax.nn.interval_linear import IntervalLinear
from qvdjax.nn.linear import Linear, QuantizedLinear
from qvdjax.nn.protocol import VideoModel
from qvdjax.nn.timestep_table import TimestepTable
from qvdjax.nn.variables import dotted, iterate

FLOAT_LAYERS = (Linear, Conv, Attention)
QUANTIZED_LAYERS = (QuantizedLinear, QuantizedConv, IntervalLinear)
TABLE_LAYERS = (TimestepTable,)


def layers_of(
    model: VideoModel, kinds: tuple[type, ...] = FLOAT_LAYERS
) -> Iterator[tuple[list[str], tuple, nnx.Module]]:
    """(names in diffusers, one a block; path in the tree of modules; layer) for every layer of the given kinds.

    What an `IntervalLinear` holds is no layer of the model: it stands for one.
    """
    whole = {path for path, _ in iterate(model, IntervalLinear)}
    for path, layer in iterate(model, kinds):
        if path[:-2] in whole:  # <path>.intervals.<number>
            continue
        if path[0] == "stacks":  # stacks.<number>.block.<path>
            yield model.stacks[path[1]].names(path[3:]), path, layer
        else:
            yield [dotted(path)], path, layer
