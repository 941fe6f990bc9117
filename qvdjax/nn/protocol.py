"""The model protocol: embed, then stacks of blocks over one stream, then head.

Scan, remat, capture of block inputs, calibration and reconstruction know a model by this and nothing else.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError
from qvdjax.nn.quantized_layer import QuantizedLayer
from qvdjax.nn.scheme import Role
from qvdjax.nn.timestep import PerCall, TimestepReader
from qvdjax.nn.variables import at, dotted, iterate, shallow_copy


class Stack(nnx.Module):
    """Neighbouring blocks of equal structure.

    Attributes:
        block: One block whose arrays carry a leading axis of `count` layers; a lone block of its own kind has no
            such axis and `count` None.
        prefix: Name of the group in diffusers ("blocks"); for a lone block its whole name ("mid_block").
        start: Number of the first block.
    """

    def __init__(self, block: nnx.Module, *, prefix: str, start: int = 0, count: int | None = None):
        self.block, self.prefix, self.start, self.count = block, prefix, start, count

    def __call__(self, stream: Any, conditioning: Any, *, remat: bool = False, collect: type | None = None):
        """Apply the blocks one after the other.

        Returns:
            The stream, and the state of all Variables of kind `collect` after the run (None without).
        """

        def body(stream, block):
            stream = block(stream, conditioning)
            return stream, None if collect is None else nnx.state(block, collect)

        step = jax.checkpoint(body) if remat else body
        return step(stream, self.block) if self.count is None else jax.lax.scan(step, stream, self.block)

    def __len__(self) -> int:
        return 1 if self.count is None else self.count

    def layer(self, number: int) -> nnx.Module:
        """One block without a layer axis, copied out of the stack; a lone block is itself."""
        return self.block if self.count is None else jax.tree.map(lambda a: a[number], self.block)

    def name(self, number: int) -> str:
        """One block's name in diffusers."""
        return self.prefix if self.count is None else f"{self.prefix}.{self.start + number}"

    def names(self, path: tuple) -> list[str]:
        """Diffusers' names, one a block, of what lies at `path` inside the block."""
        return [f"{self.name(number)}.{dotted(path)}" for number in range(len(self))]


class VideoModel(nnx.Module):
    """A denoiser of video latents.

    Attributes:
        config: Frozen dataclass with `to_dict()`, the fields of diffusers' `config.json`.
        stacks: The blocks, in order.
        recipe_name: The recipe that quantized the model; empty for a float model.
        timestep_roles: Roles whose layers see the timestep and nothing else of a sample.

    The attribute path of every Variable is its name in diffusers, the stack's `names` standing for
    `stacks.<number>.block`. Subclasses write `embed` and `head`.
    """

    config: Any
    stacks: nnx.List
    recipe_name: str = ""
    timestep_roles: tuple[Role, ...] = ("time", "modulation", "temporal_feature")

    def embed(self, latents, timestep, context, **conditions):
        """Latents and conditions -> (stream, conditioning): what the blocks change, and what they only read."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to embed")

    def head(self, stream, conditioning):
        """The last stream -> latents."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to finish")

    def video_tokens(self, tokens: int, conditioning) -> slice:
        """Which of a stream's tokens are the video's; others are the text's."""
        return slice(0, tokens)

    def token_frames(self, conditioning) -> int | None:
        """Into how many frames the video's tokens divide, which come frame by frame; None where they do not."""
        return None

    def __call__(self, latents, timestep, context, *, remat: bool = False, **conditions) -> jax.Array:
        """Predict.

        Args:
            latents: (batch, frames, height, width, channels).
            timestep: (batch,), in the checkpoint's own units (0 to 1000).
            context: (batch, tokens, dim) text embeddings.
            remat: Recompute each block's inside in the backward pass.
            conditions: Further inputs under diffusers' names.

        Returns:
            The prediction, in the layout of the latents.
        """
        return self.run(latents, timestep, context, remat=remat, **conditions)[0]

    def run(self, latents, timestep, context, *, remat: bool = False, collect: type | None = None, **conditions):
        """As calling the model, and beside the prediction the `collect` Variables of each stack as blocks left them.

        A Variable that a block writes inside a scan is lost unless it is returned; this returns it.
        """
        check_frames(self, latents.shape[1])
        model = at_timestep(self, timestep)
        stream, conditioning = model.embed(latents, timestep, context, **conditions)
        collected = []
        for stack in model.stacks:
            stream, state = stack(stream, conditioning, remat=remat, collect=collect)
            collected.append(state)
        return model.head(stream, conditioning), collected


def at_timestep(model: VideoModel, timestep: jax.Array) -> VideoModel:
    """The model with the timestep in the layers that read it (`TimestepReader`), for one call.

    The given model is left as it is and shares its arrays; without such layers it is returned itself.

    Args:
        model: Any model.
        timestep: (batch,), or (batch, tokens), of which each sample's largest counts: tokens given as condition have
            timestep 0 and say nothing about how noisy the sample is. Layers with `reads_tokens` get all of them.
    """
    return _with_timestep(model, timestep, lambda path, value: for_one_call(model, path, value))


def block_at_timestep(block: nnx.Module, timestep: jax.Array) -> nnx.Module:
    """As `at_timestep`, for one block without a layer axis."""
    return _with_timestep(block, timestep, lambda _, value: PerCall(value))


def _with_timestep(module: nnx.Module, timestep: jax.Array, held: Callable) -> nnx.Module:
    """The module with the timestep, as `held(path, value)` makes a Variable of it, in the layers that read it."""
    paths = [path for path, layer in iterate(module, TimestepReader) if layer.reads_timestep]
    if not paths:
        return module
    of_sample = timestep if timestep.ndim == 1 else timestep.max(axis=1)  # (batch, tokens) -> (batch,)
    module = shallow_copy(module)
    for path in paths:
        layer = at(module, path)
        layer.timestep = held(path, timestep if layer.reads_tokens else of_sample)
    return module


def check_frames(model: VideoModel, frames: int) -> None:
    """UserError where layers have ranges for another number of frames than latents have."""
    inputs = [layer.scheme.activation for _, layer in iterate(model, QuantizedLayer)]
    others = {quantizer.frames for quantizer in inputs if quantizer is not None} - {None, frames}
    if others:
        raise UserError(
            f"latents of {frames} frames, but the ranges of inputs are those of {others.pop()}, each its own",
            remedy="give as many frames as were calibrated, or quantize with one range for all",
        )


def for_one_call(model: VideoModel, path: tuple, value: jax.Array) -> PerCall:
    """The value as a layer at `path` holds it: in a stack with the layer axis that scan takes away again."""
    count = model.stacks[path[1]].count if path[0] == "stacks" else None
    return PerCall(value if count is None else jnp.broadcast_to(value, (count, *value.shape)))


def stacked(make, count: int, key: jax.Array) -> nnx.Module:
    """`count` blocks made by `make(key)`, their arrays stacked on a leading axis."""
    return jax.vmap(make)(jax.random.split(key, count))
