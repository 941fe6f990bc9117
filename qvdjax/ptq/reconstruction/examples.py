"""Examples of what a block gets and should give, in chunks that fit on the devices."""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx

from qvdjax.calibration.attention_received import block_attention
from qvdjax.calibration.token_weights import TokenWeights
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.nn.variables import shallow_copy

Inputs = Mapping[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """A chunk of examples; every array has a leading axis of them.

    Attributes:
        inputs: Keyword arguments of the model's call, from which a block's conditioning follows.
        stream: What the block gets, (examples, batch, tokens, width).
        target: What it should give, likewise.
        weights: Of tokens, (examples, batch, tokens) float32.
    """

    inputs: dict
    stream: jax.Array
    target: jax.Array
    weights: jax.Array


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
            divide them; a model whose stream is more than tokens.
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
    if not isinstance(stream, jax.ShapeDtypeStruct):
        raise UserError(
            "the blocks of this model hand on more than one array, and are not reconstructed yet",
            remedy="choose a recipe without reconstruction",
        )
    size = 3 * stream.size * stream.dtype.itemsize + sum(a.nbytes for a in example.values())
    examples = len(rows) // batch
    limit = max(1, min(examples, int(memory * 2**30 / size)))
    count = next(n for n in range(limit, 0, -1) if examples % n == 0)
    chunks = {name: rearrange(a, "(c e b) ... -> c e b ...", e=count, b=batch) for name, a in whole.items()}
    return [{name: a[i] for name, a in chunks.items()} for i in range(examples // count)]


@jax.jit
def embedded(outer: VideoModel, inputs: dict) -> jax.Array:
    """The first stream of every example."""
    return jax.lax.map(lambda one: outer.embed(**one)[0], inputs)


@jax.jit(static_argnames="token_weights")
def targets(
    block: nnx.Module, outer: VideoModel, inputs: dict, stream: jax.Array, token_weights: TokenWeights | None
) -> tuple[jax.Array, jax.Array]:
    """What a full-precision block gives for every example, and how its tokens are weighed."""

    def one(arrays):
        inputs, stream = arrays
        _, conditioning = outer.embed(**inputs)
        if token_weights is None:
            return block(stream, conditioning), jnp.ones(stream.shape[:2], jnp.float32)
        out, received = block_attention(block, stream, conditioning)
        return out, token_weights.of(received, outer.video_tokens(stream.shape[1], conditioning))

    return jax.lax.map(one, (inputs, stream))


@jax.jit
def outputs(block: nnx.Module, outer: VideoModel, inputs: dict, stream: jax.Array) -> jax.Array:
    """What a block gives for every example."""
    return jax.lax.map(lambda one: block(one[1], outer.embed(**one[0])[1]), (inputs, stream))


def kept(chunks: list[jax.Array]) -> list[jax.Array]:
    """The stream of every chunk between two blocks, in the memory of the hosts where there are several."""
    return chunks if len(chunks) == 1 else [_to_host(chunk) for chunk in chunks]


def _to_host(array: jax.Array) -> jax.Array:
    """The array in the memory of its devices' hosts, where devices have memory of their own."""
    device = next(iter(array.sharding.device_set))
    if device.platform == "cpu":
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("pinned_host"))


def on_device(array: jax.Array) -> jax.Array:
    """The array where it is computed with: the inverse of `_to_host`."""
    if array.sharding.memory_kind != "pinned_host" or next(iter(array.sharding.device_set)).platform == "cpu":
        return array
    return jax.device_put(array, array.sharding.with_memory_kind("device"))
