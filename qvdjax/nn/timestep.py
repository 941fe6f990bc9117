"""How the timestep of a call reaches the layers that compute differently at different timesteps."""

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError


class PerCall(nnx.Variable):
    """A value that is put into layers for one call and never stored."""


class TimestepReader(nnx.Module):
    """A layer that may want to know the timestep, as its `scheme` (a LayerScheme) says.

    The model puts it there before every call (`qvdjax.nn.protocol.at_timestep`), as an array beside the layer's own:
    in a stack it has the layer axis that scan takes away, and so nothing about blocks, scan or remat need know.
    """

    timestep: PerCall | None = None  # (batch,), or with the layer axis of a stack in front
    reads_tokens = False  # whether it wants (batch, tokens) as the model was called, not one timestep a sample

    @property
    def reads_timestep(self) -> bool:
        """Whether this layer wants it: the clip, the static range or the bits of its input depend on it."""
        activation = self.scheme.activation
        if getattr(self.scheme, "switch", None) is not None:
            return True
        if activation is not None and activation.granularity == "step":
            return True
        return self.scheme.input_clip is not None and self.scheme.input_clip.reads_timestep

    def clip_factors(self, table: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """By how much the range of the input x is narrowed, from the clip's table: see `InputClip.factors`."""
        timestep = self.current_timestep() if self.reads_timestep else None
        return self.scheme.input_clip.factors(table, timestep, x)

    def of_step(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The number of each sample's timestep, spread over an input.

        Args:
            values: [timesteps, 1], a number for each timestep of the input's quantizer.
            shape: Of the input, [(batch ...), ..., in]: every sample has the same number of its rows, one after the
                other.

        Returns:
            [(batch ...), 1, ...].
        """
        nearest = nearest_timestep(self.current_timestep(), self.scheme.activation.timesteps)  # batch
        return over_input(values[nearest, 0], shape)

    def fine(self, shape: tuple[int, ...]) -> jax.Array:
        """Whether each sample's timestep is one at which its input of this shape has more bits, as `of_step`."""
        return over_input(self.scheme.switch.at(self.current_timestep()), shape)

    def current_timestep(self) -> jax.Array:
        """(batch,) in 0..1000; with `reads_tokens` also (batch, tokens).

        Raises:
            UserError: The layer is called outside a call of its model.
        """
        if self.timestep is None:
            raise UserError(
                "a layer that computes differently at different timesteps was called without one",
                remedy="call the model, or take the layer from qvdjax.nn.at_timestep(model, timestep)",
            )
        return self.timestep[...]


def nearest_timestep(timestep: jax.Array, held: tuple[float, ...]) -> jax.Array:
    """timestep (batch,) -> which of those held is nearest to each, (batch,)."""
    return jnp.abs(timestep[:, None] - jnp.asarray(held)).argmin(axis=1)  # batch timesteps -> batch


def by_row(values: jax.Array, rows: int) -> jax.Array:
    """What belongs to each sample, [batch, ...], for an input of so many rows: [(batch ...), ...]."""
    return jnp.repeat(values, rows // len(values), axis=0)


def over_input(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A number for each sample, (batch,) -> [(batch ...), 1, ...], for an input of that shape."""
    return by_row(values, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
