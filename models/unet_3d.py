"""ModelScope's text-to-video model of 1.7 billion parameters (diffusers' UNet3DConditionModel).

Read in diffusers 0.42 `models/unets/unet_3d_condition.py`, `models/unets/unet_3d_blocks.py`, `models/resnet.py`
(TemporalConvLayer) and `models/transformers/transformer_temporal.py`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from models.unet_3d_config import UNet3DConfig
from models.unet_blocks import ALONG_FRAMES, Parts, ResnetBlock
from models.unet_config import check_sizes
from models.unet_levels import Place, VideoUNet
from models.unet_stream import UNetConditioning, UNetStream
from models.unet_transformers import SpatialTransformer, TemporalTransformer
from qvdjax.nn import Conv, GroupNorm, PartialBlock, Stack

HEADS_IN = 8  # of the transformer before the levels, whatever its channels


class UNet3DConditionModel(VideoUNet):
    """The video UNet: in every layer a ResNet and convolutions over frames, and where the level attends to the text
    transformers over a frame and over frames. One more transformer over frames stands before all levels."""

    def __init__(self, config: UNet3DConfig, *, key: jax.Array, dtype=jnp.float32):
        first, rest = jax.random.split(key)
        options = {"groups": config.norm_num_groups, "epsilon": config.norm_eps, "key": rest, "dtype": dtype}
        opening = Stack(OpeningTransformer(config, key=first, dtype=dtype), prefix="transformer_in")
        super().__init__(config, functools.partial(_parts, config), first=(opening,), **options)

    def embed(self, latents, timestep, context):
        """Latents (batch, frames, height, width, channels) -> the stream and its conditioning.

        Computation is in the type of the weights. `context` is one text a video, (batch, tokens, text_dim).

        Raises:
            UserError: No frame, a height or width that cannot be halved as often as the model does, other channels or
                another text width than the checkpoint's, timesteps a token.
        """
        check_sizes(self.config, latents.shape, jnp.shape(timestep), context.shape)
        embedding = self.time_embedding(timestep, self.dtype).astype(self.dtype)
        return UNetStream(self.first_sample(latents), ()), UNetConditioning(embedding, context.astype(self.dtype))


class OpeningTransformer(PartialBlock, TemporalTransformer):
    """The transformer before the levels; what it returns is also the first skip connection."""

    def __init__(self, config: UNet3DConfig, *, key: jax.Array, dtype):
        inside = HEADS_IN * config.attention_head_dim
        channels, groups = config.block_out_channels[0], config.norm_num_groups
        super().__init__(channels, inside, HEADS_IN, groups, key=key, dtype=dtype)

    def read(self, stream: UNetStream) -> tuple[jax.Array, ...]:
        """The sample."""
        return (stream.sample,)

    def make(self, part: tuple[jax.Array, ...], conditioning: UNetConditioning) -> tuple[jax.Array, ...]:
        """The sample."""
        return (TemporalTransformer.__call__(self, *part, conditioning),)

    def put(self, stream: UNetStream, made: tuple[jax.Array, ...]) -> UNetStream:
        """Changes the sample and opens a skip connection."""
        return stream.opened(*made, *made)


class TemporalConvLayer(nnx.Module):
    """Four times norm over all frames, SiLU, convolution over frames; added to the input."""

    def __init__(self, width: int, groups: int, *, key: jax.Array, dtype):
        across, back = ("mlp", "embed"), ("embed", "mlp")
        for number, (axes, k) in enumerate(zip((across, back) * 2, jax.random.split(key, 4), strict=True), start=1):
            norm = GroupNorm(width, groups, epsilon=1e-5, axis=axes[1], dtype=dtype)
            conv = Conv(width, width, **ALONG_FRAMES, role="convolution", axes=axes, key=k, dtype=dtype)
            # Between them PyTorch has SiLU, and in all but the first dropout, under numbers of their own.
            setattr(self, f"conv{number}", nnx.Dict({"0": norm, "2" if number == 1 else "3": conv}))

    def __call__(self, x: jax.Array, conditioning: UNetConditioning) -> jax.Array:
        """x (batch, frames, height, width, channels) -> the same; nothing of the conditioning is read."""
        inner = x
        for layers, conv in ((self.conv1, "2"), (self.conv2, "3"), (self.conv3, "3"), (self.conv4, "3")):
            inner = layers[conv](jax.nn.silu(layers["0"](inner)).astype(x.dtype))
        return x + inner


def _parts(config: UNet3DConfig, place: Place, *, key: jax.Array, dtype) -> Parts:
    """What a block does. In the middle there are a ResNet and convolutions on either side of the transformers."""
    keys, width, options = jax.random.split(key, 6), place.width, {"dtype": dtype}
    groups, heads = config.norm_num_groups, width // config.attention_head_dim
    norms = {"groups": groups, "epsilon": config.norm_eps}

    def convolutions(number: str, first: jax.Array, second: jax.Array) -> Parts:
        resnet = ResnetBlock(place.channels, width, config.time_dim, parts=place.parts, key=first, **norms, **options)
        return [
            ("resnets", number, resnet),
            ("temp_convs", number, TemporalConvLayer(width, groups, key=second, **options)),
        ]

    number = place.number or "0"
    parts = convolutions(number, keys[0], keys[1])
    if place.attends:
        text = config.cross_attention_dim
        parts += [
            ("attentions", number, SpatialTransformer(width, heads, text, groups, linear=True, key=keys[2], **options)),
            ("temp_attentions", number, TemporalTransformer(width, width, heads, groups, key=keys[3], **options)),
        ]
    if place.way == "middle":
        parts += convolutions("1", keys[4], keys[5])
    return parts
