"""`tabulate`: layers that see the timestep alone become tables over the timesteps of one sampler."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvdjax.description import layer_bytes, weight_shape
from qvdjax.errors import UserError
from qvdjax.nn import (
    Linear,
    QuantizedLinear,
    TableScheme,
    TimestepTable,
    VideoModel,
    at_timestep,
    layers_of,
    refuse_tables,
)  # fmt: skip
from qvdjax.nn.variables import dotted, replace

MOST_NEGATIVE = 10  # a quarter of the logarithm of a noise level of 4e-18


def tabulate(model: VideoModel, timesteps: Iterable[float], *, sampler: str = "") -> VideoModel:
    """A model whose layers that see the timestep alone are tables, for one sampler's timesteps.

    Their outputs depend on the step and on nothing else, so a row a step says all that they will ever say; DSAQuant
    (arXiv 2609.04031) does so after training, and TFMQ-DM (CVPR 2024) calls it a cache of temporal features. Every
    layer of the model's `timestep_roles` becomes a table. Of layers one after the other only the
    last is read then; the tables before it take steps x out numbers, which is little beside what they replace.

    Args:
        model: Float or quantized, left as it is. A quantized layer is tabulated as it computes, at its own execution.
        timesteps: Those that the sampler visits, as a schedule says them; repeated ones count once. Where tokens that
            are given as condition have timestep 0, add 0.
        sampler: In words, for those who later sample otherwise.

    Returns:
        A new model of the same call, for these timesteps. `qvdjax.describe` lists the tables.

    Raises:
        UserError: No timestep, or one out of range; a model without such layers, or with tables already.
    """
    refuse_tables(model, "the model", "tabulate the model it was made from")
    held = tuple(dict.fromkeys(float(np.float32(timestep)) for timestep in timesteps))
    # EDM's timesteps are logarithms, and may be less than 0; no solver's are less than that.
    if not held or not all(-MOST_NEGATIVE <= timestep <= 1000 for timestep in held):
        raise UserError(
            f"tables over the timesteps {held}",
            remedy=f"give at least one, all from {-MOST_NEGATIVE} to 1000",
        )
    outputs = record(model, held)
    if not outputs:
        raise UserError("no layer of this model sees the timestep alone", remedy="there is nothing to tabulate")
    tabulated = nnx.clone(model)
    for path, layer in _timestep_layers(tabulated):
        scheme = TableScheme(held, sampler, layer_bytes(layer))
        table = TimestepTable(
            outputs[dotted(path)], role=layer.role, axes=layer.axes, scheme=scheme, weight_shape=weight_shape(layer)
        )
        replace(tabulated, path, table)
    return tabulated


class Recorded(nnx.Variable):
    """What a layer returned."""


class Recorder(nnx.Module):
    """A layer that keeps the output of its last call."""

    seen: Recorded | None = None  # [batch or 1, (1,) out]

    def __init__(self, layer: Linear | QuantizedLinear):
        self.layer = layer

    def __call__(self, x: jax.Array) -> jax.Array:
        """As the layer."""
        y = self.layer(x)
        self.seen = Recorded(y)
        return y


def record(model: VideoModel, timesteps: tuple[float, ...]) -> dict[str, jax.Array]:
    """The outputs of all layers that see the timestep alone, at these timesteps.

    Args:
        model: Float or quantized.
        timesteps: 0..1000.

    Returns:
        Path of the layer in the tree of modules, dotted -> [steps, out], in a stack [layers, steps, out].
    """
    layers = _timestep_layers(model)
    recording = nnx.clone(model)
    for path, layer in _timestep_layers(recording):
        replace(recording, path, Recorder(layer))
    steps, config = len(timesteps), model.config
    latents = jnp.zeros((steps, *config.least_size, config.latent_channels), jnp.float32)
    context = jnp.zeros((steps, config.text_tokens, config.text_dim), jnp.float32)
    conditions = {name: jnp.zeros((steps, *shape), jnp.float32) for name, shape in config.conditions.items()}
    seen = _record(recording, latents, jnp.asarray(timesteps, jnp.float32), context, conditions)
    tables = {}
    for path, layer in layers:
        y, out = seen[dotted(path)], weight_shape(layer)[0]
        leading = y.shape[:1] if path[0] == "stacks" and model.stacks[path[1]].count is not None else ()
        rows = y.shape[len(leading)]  # 1 where a layer does not even see the timestep
        if math.prod(y.shape) != math.prod(leading) * rows * out or rows not in (1, steps):
            raise ValueError(f"{dotted(path)} of role {layer.role} returns {y.shape}: it sees more than the timestep")
        y = y.reshape(*leading, rows, out)  # [layers,] batch (1) out -> [layers,] rows out
        tables[dotted(path)] = jnp.broadcast_to(y, (*leading, steps, out))
    return tables


@jax.jit
def _record(model: VideoModel, latents, timesteps, context, conditions) -> dict[str, jax.Array]:
    """One call of the model, of which only these layers and what leads to them is computed: the rest is dead code."""
    model = at_timestep(model, timesteps)
    stream, conditioning = model.embed(latents, timesteps, context, **conditions)
    seen = {}
    for number, stack in enumerate(model.stacks):
        stream, state = stack(stream, conditioning, collect=Recorded)
        inside = {dotted(path[:-1]): variable.get_value() for path, variable in nnx.to_flat_state(state)}
        seen.update({f"stacks.{number}.block.{path}": value for path, value in inside.items()})
    model.head(stream, conditioning)
    outside = ((path, recorder) for _, path, recorder in layers_of(model, (Recorder,)) if path[0] != "stacks")
    return seen | {dotted(path): recorder.seen[...] for path, recorder in outside}


def _timestep_layers(model: VideoModel) -> list[tuple[tuple, nnx.Module]]:
    """Paths and layers of the roles that see the timestep alone."""
    layers = layers_of(model, (Linear, QuantizedLinear))
    return [(path, layer) for _, path, layer in layers if layer.role in model.timestep_roles]
