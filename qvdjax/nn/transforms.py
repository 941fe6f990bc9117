"""What a layer's input may pass through before it is quantized, undone by a change of the weight."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn.variables import Scale


class ChannelScale(nnx.Module):
    """Divides each input channel by `smooth_scale` [in]; the weight's columns carry the factor (SmoothQuant)."""

    name = "smooth_scale"

    def __init__(self, smooth_scale: jax.Array, *, axes: tuple = (None,)):
        self.smooth_scale = Scale(smooth_scale, axes=axes)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x / self.smooth_scale[...]  # the result is at least float32, as the quantizer wants it

    def on_weight(self, weight: jax.Array) -> jax.Array:
        """[..., out, in] -> the weight that meets scaled inputs; `smooth_scale` may carry the same leading axes."""
        return weight * self.smooth_scale[...][..., None, :]

    @classmethod
    def identity(cls, width: int, axes: tuple = (None,)) -> "ChannelScale":
        """The transform that changes nothing, for building the shape of a saved layer."""
        return cls(jnp.ones((width,), jnp.float32), axes=axes)


TRANSFORMS = {transform.name: transform for transform in (ChannelScale,)}
