"""A table of outputs, one row a timestep, in the place of a layer that sees the timestep alone."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn.linear import Linear
from qvdjax.nn.scheme import Role, TableScheme
from qvdjax.nn.timestep import TimestepReader
from qvdjax.nn.variables import Table, iterate, shape_of


class TimestepTable(TimestepReader):
    """The outputs of a layer at the timesteps that a sampler visits; the layer's weights are gone.

    What the layer is called with says only how many axes the output has, and in which type it is. A timestep that no
    row holds gives NaN: nothing can be raised inside jit, and a neighbour's row would look like an answer. Whoever
    knows the timesteps beforehand asks `check_timesteps`.

    Attributes:
        table: [steps, out].
        scheme: Which timesteps the rows are.
        role, axes, weight_shape: Of the layer in whose place it stands; axes and shape are of its weight, [out, in].
    """

    reads_tokens = True

    def __init__(
        self, table: jax.Array, *, role: Role, axes: tuple, scheme: TableScheme, weight_shape: tuple[int, int]
    ):
        self.table = Table(table, axes=(None, axes[0]))
        self.role, self.axes, self.scheme, self.weight_shape = role, axes, scheme, weight_shape

    @classmethod
    def empty(cls, layer: Linear, scheme: TableScheme) -> "TimestepTable":
        """A table of zeros in the place of a float layer or a stack of them, for building the shape of a saved one."""
        if not isinstance(layer, Linear):
            raise ValueError(f"layers of kind {type(layer).__name__} cannot be tables")
        *leading, out, width = shape_of(layer.weight)
        zeros = jnp.zeros((*leading, len(scheme.timesteps), out), jnp.float32)
        return cls(zeros, role=layer.role, axes=layer.axes, scheme=scheme, weight_shape=(out, width))

    @property
    def reads_timestep(self) -> bool:
        """Always."""
        return True

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [batch, (tokens,) in] -> [batch, (tokens or 1,) out] in x's type."""
        timestep = self.current_timestep().astype(jnp.float32)  # (batch,) or (batch, tokens)
        distances = jnp.abs(timestep[..., None] - jnp.asarray(self.scheme.timesteps, jnp.float32))  # (..., steps)
        rows = self.table[...][distances.argmin(axis=-1)]  # (batch, [tokens,] out)
        rows = jnp.where(distances.min(axis=-1, keepdims=True) < self.scheme.same, rows, jnp.nan)
        between = (1,) * (x.ndim - 1 - timestep.ndim)
        return rows.reshape(*timestep.shape, *between, rows.shape[-1]).astype(x.dtype)  # as many axes as x


def tables_of(model: nnx.Module) -> list[TimestepTable]:
    """All tables of a model, abstract or not."""
    return [layer for _, layer in iterate(model, TimestepTable)]


def check_timesteps(model: nnx.Module, timesteps: Iterable[float]) -> None:
    """Refuse timesteps that a model's tables do not hold; a model without tables takes any.

    Args:
        model: Abstract or not.
        timesteps: Those that a sampler visits.

    Raises:
        UserError: What the tables are made for, and the timesteps that are not there.
    """
    timesteps = [float(timestep) for timestep in timesteps]
    for scheme in {table.scheme for table in tables_of(model)}:
        others = [t for t in timesteps if min(abs(t - held) for held in scheme.timesteps) >= scheme.same]
        if others:
            made_for = f" of {scheme.sampler}" if scheme.sampler else ""
            raise UserError(
                f"this model's tables hold the {len(scheme.timesteps)} timesteps{made_for}; this sampler visits others",
                remedy="sample as it was tabulated, or tabulate the model it was made from for this sampler",
                items=[f"{timestep:g}" for timestep in others],
            )


def refuse_tables(model: nnx.Module, name: str, remedy: str) -> None:
    """UserError for a model with tables, where the weights that they replaced would be needed.

    Args:
        model: Abstract or not.
        name: Of the model or its folder, for the message.
        remedy: What to do instead.
    """
    if tables := tables_of(model):
        steps = len(tables[0].scheme.timesteps)
        raise UserError(f"{name} holds tables over {steps} steps in the place of layers of the timestep", remedy=remedy)
