"""What is known of a layer before it is reconstructed."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn import Conv, InputTransform, LayerScheme, Linear
from qvdjax.ptq.layers import rows_of_positions, static_edges


@dataclasses.dataclass(frozen=True)
class Known:
    """What calibration found of a layer; each may be missing.

    Attributes:
        ranges: Smallest and largest input of each channel, [channels] each, or [timesteps, channels].
        edges: Ends of static ranges of the transformed input, [ranges] each. Without them, those of `ranges`.
        fitted: Arrays of the layer's transform, where these were searched for.
        levels: Levels and edges of the grid of an input that is the timestep's alone.
        done: The quantized layer itself, where nothing is left to train.
    """

    ranges: tuple[jax.Array, jax.Array] | None = None
    edges: tuple[jax.Array, jax.Array] | None = None
    fitted: Mapping[str, jax.Array] | None = None
    levels: tuple[jax.Array, jax.Array] | None = None
    done: nnx.Module | None = None

    def transform(self, weight: jax.Array, scheme: LayerScheme, fit, positions: int) -> InputTransform | None:
        """The scheme's transform for a weight [out, (channels positions)], as it starts."""
        if not scheme.transforms:
            return None
        if self.fitted is not None:
            return InputTransform.of(scheme, jax.tree.map(jnp.asarray, dict(self.fitted)))
        low, high = self.ranges or (None, None)
        return InputTransform.of(scheme, _fitted(weight, low, high, fit=fit, positions=positions))

    def static_edges(self, scheme: LayerScheme, transform: InputTransform | None) -> tuple:
        """Ends of the input's static ranges; zeros where there are none."""
        if self.edges is not None:
            return self.edges
        if self.ranges is None or scheme.activation is None or scheme.activation.dynamic:
            return 0.0, 0.0
        ends = (jnp.asarray(a) if transform is None else transform.of_ranges(jnp.asarray(a)) for a in self.ranges)
        return static_edges(*ends, scheme.split)


@jax.jit(static_argnames=("fit", "positions"))
def _fitted(weight, low, high, *, fit, positions: int) -> dict[str, jax.Array]:
    rows = rows_of_positions(weight.astype(jnp.promote_types(weight.dtype, jnp.float32)), positions)
    return fit.fit(rows, low, high).arrays()


def flat_weight(layer: Linear | Conv) -> jax.Array:
    """[out, in] of a linear layer, [out, (channels positions)] of a convolution."""
    weight = layer.weight[...]
    return weight.reshape(weight.shape[0], -1)
