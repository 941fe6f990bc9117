"""The layers that add the timestep to a UNet's blocks, as one block that sees the timestep alone (TFMQ-DM)."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.nn import LayerScheme, Linear, PartialBlock, VideoModel, layers_of
from qvdjax.nn.partial_block import Arrays
from qvdjax.nn.variables import own_shape
from qvdjax.ptq.feature_grids import ROLE
from qvdjax.ptq.layers import quantize_layer, quantized_arrays
from qvdjax.ptq.reconstruction.examples import Examples
from qvdjax.ptq.reconstruction.known import Known
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.training import prepared_layer

TEMPORAL: Final = "temporal_features"  # the name of this block


class TemporalLayers(PartialBlock):
    """Layers side by side, each with an input of its own."""

    def __init__(self, layers: list[nnx.Module]):
        self.layers = nnx.List(layers)

    def read(self, stream: Arrays) -> Arrays:
        """All inputs."""
        return stream

    def make(self, part: Arrays, conditioning: Any) -> Arrays:
        """Inputs [timesteps, in] -> outputs [timesteps, out]."""
        return tuple(layer(x) for layer, x in zip(self.layers, part, strict=True))

    def put(self, stream: Arrays, made: Arrays) -> Arrays:
        """The outputs."""
        return made


class NoModel(VideoModel):
    """A model that conditions nothing."""

    def embed(self, **inputs):
        """Nothing, of nothing."""
        return None, None


@dataclasses.dataclass(frozen=True)
class Unit:
    """The block of all these layers, ready for training.

    Attributes:
        student: The layers, set up for it.
        outer: What conditions it: nothing.
        examples: One, of all timesteps.
        names: Of the layers in diffusers.
        float_layers: As they were.
    """

    student: TemporalLayers
    outer: VideoModel
    examples: Examples
    names: tuple[str, ...]
    float_layers: tuple[Linear, ...]

    def learned(self, student: TemporalLayers) -> dict[str, dict]:
        """What was learned, by name."""
        return dict(zip(self.names, _learned(student), strict=True))

    def done(
        self, schemes: Mapping[str, LayerScheme], learned: Mapping[str, dict], levels: Mapping[str, tuple] | None
    ) -> dict[str, Known]:
        """The quantized layers, by name, as the blocks that hold them are to see them."""
        found = {}
        for name, layer in zip(self.names, self.float_layers, strict=True):
            scheme = schemes[name]
            arrays = quantized_arrays(layer.weight[...], scheme, name=name, learned=learned[name])
            quantized = quantize_layer(layer, scheme, execution="simulate", arrays=arrays)
            if scheme.feature_grid is not None:
                quantized.input_levels[...], quantized.input_edges[...] = map(jnp.asarray, levels[name])
            found[name] = Known(done=quantized)
        return found


def temporal_layers(
    model: VideoModel, schemes: Mapping[str, LayerScheme], features: Mapping[str, np.ndarray], fit,
    known: Mapping[str, Known], plan: Reconstruction,
) -> Unit | None:  # fmt: skip
    """The quantized layers of role "temporal_feature" of a float model; None where there are none.

    They are trained towards sum over layers of || h(t) - h_q(t) ||^2 at all timesteps t at once (TFMQ-DM's temporal
    information aware reconstruction, arXiv 2311.16503). The layers that make the time embedding are not among them:
    recipes leave these float, or round them to nearest codes.

    Args:
        model: Left as it is.
        schemes: By name in diffusers.
        features: Inputs [timesteps, in], by name.
        fit, known, plan: As `prepared` takes them, `known` by name.
    """
    found = [(name, layer) for name, layer in _layers(model) if schemes[name].weight is not None]
    if not found:
        return None
    names, layers = zip(*found, strict=True)
    part = tuple(jnp.asarray(features[name])[None] for name in names)  # [timesteps, in] -> [1, timesteps, in]
    target = _outputs(TemporalLayers(list(layers)), part)
    weights = tuple(jnp.ones(a.shape[:-1], jnp.float32) for a in target)
    students = [prepared_layer(layer, schemes[name], fit, known.get(name, Known()), plan) for name, layer in found]
    return Unit(TemporalLayers(students), NoModel(), Examples({}, part, target, weights), names, layers)


def _layers(model: VideoModel) -> Iterator[tuple[str, Linear]]:
    """Names and layers of the role, one a block."""
    for names, path, layer in layers_of(model, (Linear,)):
        if layer.role != ROLE:
            continue
        stacked = path[0] == "stacks" and layer.weight.get_value().ndim > len(own_shape(layer.weight))
        for i, name in enumerate(names):
            yield name, jax.tree.map(lambda a, i=i: a[i], layer) if stacked else layer


@jax.jit
def _outputs(block: TemporalLayers, part: Arrays) -> Arrays:
    return block.make(part, None)


@jax.jit
def _learned(block: TemporalLayers) -> list[dict]:
    return [layer.learned() for layer in block.layers]
