"""Examples of what a block gets and should give, in chunks that fit on the devices."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from qvdjax.calibration.attention_received import block_attention
from qvdjax.calibration.token_weights import TokenWeights
from qvdjax.errors import UserError
from qvdjax.nn import PartialBlock, VideoModel
from qvdjax.nn.partial_block import Arrays, make
from qvdjax.nn.protocol import block_at_timestep
from qvdjax.nn.variables import shallow_copy

Inputs = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """A chunk of examples; every array has a leading axis of them.

    Attributes:
        inputs: Keyword arguments of the model's call, from which a block's conditioning follows.
        part: What the block reads of the stream, arrays (examples, batch, tokens, width) or of a UNet (examples, batch,
            frames, height, width, channels); see `qvdjax.nn.partial_block`.
        target: What it should make, likewise.
        weights: Of tokens or places, like the targets without their last axis, float32.
    """

    inputs: dict
    part: Arrays
    target: Arrays
    weights: Arrays


def without_blocks(model: VideoModel) -> VideoModel:
    """A model's embedders and head alone; it shares their arrays."""
    model = shallow_copy(model)
    model.stacks = nnx.List([])
    return model


def in_chunks(batches: Iterable[Inputs], batch: int, outer: VideoModel, memory: float) -> list[dict]:
    """Model inputs as chunks of equally many examples, [examples, batch, ...] each, on the host.

    Args:
        batches: Keyword arguments of the model's call, of any number of rows.
        batch: Rows of an example. Rows of different batches may meet in one.
        outer: See `without_blocks`; says how large an example's stream is.
        memory: GiB that a chunk may take on the devices with its stream, target and output; it has one at least.

    Raises:
        UserError: There are none, they are of different shapes, hold values that are not finite, or `batch` does not
            divide them.
    """
    rows = [{name: np.asarray(a)[i] for name, a in one.items()} for one in batches for i in range(len(one["latents"]))]
    if not rows:
        raise UserError("there is nothing to reconstruct on", remedy="make a calibration set with `qvdjax calibrate`")
    shapes = {tuple(sorted((name, a.shape) for name, a in row.items())) for row in rows}
    if len(shapes) > 1:
        raise UserError("calibration inputs are of different shapes", remedy="use one size and length of prompts")
    if not all(np.isfinite(a).all() for row in rows for a in row.values()):
        raise UserError("a calibration input holds values that are not finite", remedy="calibrate again")
    if len(rows) % batch:
        raise UserError(
            f"{len(rows)} calibration inputs do not divide into batches of {batch}", remedy="choose another batch"
        )
    whole = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    example = {name: a[:batch] for name, a in whole.items()}
    stream, _ = jax.eval_shape(lambda outer, inputs: outer.embed(**inputs), outer, example)
    # A UNet's first stream is the sample and the same as a skip connection: about as much as any of its blocks reads.
    streams = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(stream))
    size = 3 * streams + sum(a.nbytes for a in example.values())
    examples = len(rows) // batch
    limit = max(1, min(examples, int(memory * 2**30 / size)))
    count = next(n for n in range(limit, 0, -1) if examples % n == 0)
    chunks = {name: rearrange(a, "(c e b) ... -> c e b ...", e=count, b=batch) for name, a in whole.items()}
    return [{name: a[i] for name, a in chunks.items()} for i in range(examples // count)]


def embedded(outer: VideoModel, inputs: dict) -> Any:
    """The first stream of every example; arrays that are one in the model are one here."""
    stream = _embedded(outer, inputs)
    traced = jax.make_jaxpr(lambda: _first_stream(outer, inputs))().jaxpr.outvars
    leaves, structure = jax.tree.flatten(stream)
    return jax.tree.unflatten(structure, [leaves[traced.index(variable)] for variable in traced])


def _first_stream(outer: VideoModel, inputs: dict) -> Any:
    return outer.embed(**jax.tree.map(lambda a: a[0], inputs))[0]


@jax.jit
def _embedded(outer: VideoModel, inputs: dict) -> Any:
    return jax.lax.map(lambda one: outer.embed(**one)[0], inputs)


def made(block: nnx.Module, outer: VideoModel, inputs: dict, part: Arrays, **how: Any) -> tuple[Arrays, Any]:
    """What a block makes at one example, and its conditioning; `how` are keyword arguments of its call."""
    _, conditioning = outer.embed(**inputs)
    return make(block_at_timestep(block, inputs.get("timestep")), part, conditioning, **how), conditioning


@jax.jit(static_argnames="token_weights")
def targets(
    block: nnx.Module, outer: VideoModel, inputs: dict, part: Arrays, token_weights: TokenWeights | None
) -> tuple[Arrays, Arrays]:
    """What a full-precision block makes for every example, and how its tokens are weighed.

    Weights follow from attention over the stream, which UNets have none of: there all places weigh alike.
    """

    def one(arrays):
        inputs, part = arrays
        _, conditioning = outer.embed(**inputs)
        if token_weights is None or isinstance(block, PartialBlock):
            found = make(block, part, conditioning)
            return found, jax.tree.map(lambda a: jnp.ones(a.shape[:-1], jnp.float32), found)
        out, received = block_attention(block, *part, conditioning)
        return (out,), (token_weights.of(received, outer.video_tokens(out.shape[1], conditioning)),)

    return jax.lax.map(one, (inputs, part))


@jax.jit
def outputs(block: nnx.Module, outer: VideoModel, inputs: dict, part: Arrays) -> Arrays:
    """What a block makes for every example."""
    return jax.lax.map(lambda one: made(block, outer, *one)[0], (inputs, part))


def kept(chunks: list) -> list:
    """What blocks made, or the first stream, of every chunk between two blocks: in the memory of the hosts where there
    are several chunks, what is there already once."""
    return chunks if len(chunks) == 1 else [_each_once(_to_host, chunk) for chunk in chunks]


def on_device(tree: Any) -> Any:
    """Arrays where they are computed with."""
    return jax.tree.map(_to_device, tree)


def _each_once(change: Callable, tree: Any) -> Any:
    """`change` of every array of a tree, of one that stands in several places once."""
    changed = {id(a): change(a) for a in {id(a): a for a in jax.tree.leaves(tree)}.values()}
    return jax.tree.map(lambda a: changed[id(a)], tree)


def _to_host(array: jax.Array) -> jax.Array:
    """The array in the memory of its devices' hosts, where devices have memory of their own."""
    device = next(iter(array.sharding.device_set))
    if device.platform == "cpu":
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def _to_device(array: jax.Array) -> jax.Array:
    """The inverse of `_to_host`."""
    if array.sharding.memory_kind != "pinned_host" or next(iter(array.sharding.device_set)).platform == "cpu":
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("device"))
