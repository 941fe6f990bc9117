"""A linear layer that is quantized for each interval of timesteps on its own."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.nn.linear import QuantizedLinear
from qvdjax.nn.scheme import LayerScheme
from qvdjax.nn.timestep import TimestepReader, over_input


class IntervalLinear(TimestepReader):
    """Quantized layers that stand for one layer, each in an interval of timesteps.

    A channel scale that is fitted to an interval is in the codes of the weight, so that every interval has codes of its
    own: memory is that of so many weights, time that of one.

    Attributes:
        intervals: The layers, by interval.
        scheme: Theirs, with the intervals.
        role, axes, execution: Of each of them.
    """

    def __init__(self, intervals: Sequence[QuantizedLinear], scheme: LayerScheme):
        if len(intervals) != len(scheme.timestep_intervals):
            raise ValueError(f"{len(intervals)} layers for {len(scheme.timestep_intervals)} intervals of timesteps")
        self.intervals, self.scheme = nnx.List(intervals), scheme
        self.role, self.axes, self.execution = intervals[0].role, intervals[0].axes, intervals[0].execution

    @property
    def reads_timestep(self) -> bool:
        """Always."""
        return True

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [(batch ...), ..., in] -> [(batch ...), ..., out], in x's type.

        Where all samples are in one interval, as while videos are sampled, only its product is computed.
        """
        numbers = self.scheme.timestep_intervals.of(self.current_timestep())  # (batch,)

        def apart(x):
            mine = over_input(numbers, x.shape)  # [(batch ...), 1, ...]
            y, *rest = (layer(x) for layer in self.intervals)
            for number, other in enumerate(rest, start=1):
                y = jnp.where(mine == number, other, y)
            return y

        together = (numbers == numbers[0]).all()
        return jax.lax.switch(jnp.where(together, numbers[0], len(self.intervals)), (*self.intervals, apart), x)
