"""Inputs that are rounded more finely at some timesteps than at others."""

import dataclasses

import jax
import jax.numpy as jnp

from qvdjax.nn.timestep import nearest_timestep


@dataclasses.dataclass(frozen=True)
class BitSwitch:
    """At which timesteps the input of a layer has more bits than its quantizer says.

    Attributes:
        bits: That it has there, up to 8: the product's operands are bytes at all timesteps.
        timesteps: All that a sampler visits, ascending; another one counts as the nearest of them.
        fine: Whether each of them is one with `bits` bits.
    """

    bits: int
    timesteps: tuple[float, ...]
    fine: tuple[bool, ...]

    def __post_init__(self):
        if not self.timesteps or len(self.timesteps) != len(self.fine):
            raise ValueError(f"{len(self.fine)} choices of bits for {len(self.timesteps)} timesteps")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")

    @property
    def share(self) -> float:
        """Of the timesteps that have `bits` bits."""
        return sum(self.fine) / len(self.fine)

    def at(self, timestep: jax.Array) -> jax.Array:
        """timestep (batch,) -> whether each sample's input has `bits` bits, bool (batch,)."""
        return jnp.asarray(self.fine)[nearest_timestep(timestep, self.timesteps)]

    @classmethod
    def from_dict(cls, fields: dict) -> "BitSwitch":
        """Inverse of `dataclasses.asdict`, also after a way through JSON."""
        return cls(fields["bits"], tuple(map(float, fields["timesteps"])), tuple(map(bool, fields["fine"])))
