"""CLIP's encoder of images: that of Stable Video Diffusion (projected) and Wan's image-to-video (penultimate tokens).

Read in transformers 5.24 `models/clip/modeling_clip.py` (CLIPVisionModel, CLIPVisionModelWithProjection).
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from models.clip_blocks import blocks_of, check_clip, fields_of, norm_of
from models.encoder_blocks import Embedding, stream_dtype
from qvdjax.errors import UserError
from qvdjax.nn import Conv, Linear, Param

PLAIN, PROJECTED = "CLIPVisionModel", "CLIPVisionModelWithProjection"


@dataclasses.dataclass(frozen=True)
class CLIPVisionConfig:
    """Fields of transformers' `config.json` that decide what the encoder computes; the defaults are transformers'.

    `architectures` says whether there is a projection of the pooled vector.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    architectures: tuple[str, ...] | None = None

    def __post_init__(self):
        check_clip(self, PLAIN, PROJECTED)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.hidden_size

    @property
    def projected(self) -> bool:
        """Whether the pooled vector is projected."""
        return self.architectures == (PROJECTED,)

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return fields_of(self, "clip_vision_model")


class CLIPVisionEncoder(nnx.Module):
    """Images -> tokens, the image's own and one a patch, or one vector. Names of parameters are transformers'."""

    recipe_name: str = ""

    def __init__(self, config: CLIPVisionConfig, *, key: jax.Array, dtype=jnp.float32):
        keys = jax.random.split(key, 5)
        self.config = config
        width, patch = config.hidden_size, (config.patch_size,) * 2
        self.vision_model = nnx.Dict({
            "embeddings": nnx.Dict({
                "class_embedding": Param(jax.random.normal(keys[0], (width,), dtype), axes=("embed",)),
                "patch_embedding": Conv(
                    config.num_channels, width, patch, stride=patch, role="embedder", axes=("embed", None),
                    key=keys[1], dtype=dtype, bias=False,
                ),
                "position_embedding": Embedding(
                    (config.image_size // config.patch_size) ** 2 + 1, width, key=keys[2], dtype=dtype
                ),
            }),
            "pre_layrnorm": norm_of(config, dtype),  # spelled so in the checkpoints
            "post_layernorm": norm_of(config, dtype),
        })  # fmt: skip
        self.stacks = blocks_of(config, "vision_model.encoder.layers", key=keys[3], dtype=dtype)
        self.visual_projection = Linear(
            width, config.projection_dim, role="head", axes=(None, "embed"), key=keys[4], dtype=dtype, bias=False
        ) if config.projected else None  # fmt: skip

    def __call__(
        self, images: jax.Array, *, output: Literal["last", "penultimate", "pooled"] = "last"
    ) -> jax.Array:  # fmt: skip
        """Encode.

        Args:
            images: (batch, image_size, image_size, channels), of CLIP's mean and standard deviation.
            output: The tokens after the last block or before it, as they are; or the image's own after the last,
                normalised, and projected where the model has a projection.

        Returns:
            (batch, 1 + patches, hidden_size), or (batch, hidden_size or projection_dim).

        Raises:
            UserError: Images of another size.
        """
        config, model = self.config, self.vision_model
        if images.ndim != 4 or images.shape[1:] != (config.image_size, config.image_size, config.num_channels):
            raise UserError(
                f"images of shape {images.shape} do not fit this encoder",
                remedy=f"give (batch, {config.image_size}, {config.image_size}, {config.num_channels})",
            )
        embeddings = model["embeddings"]
        own = embeddings["class_embedding"][...]
        dtype = stream_dtype(own)
        patches = rearrange(embeddings["patch_embedding"](images.astype(dtype)), "b h w d -> b (h w) d")
        own = jnp.broadcast_to(own.astype(dtype), (len(images), 1, config.hidden_size))
        x = jnp.concatenate([own, patches], axis=1)  # (batch, 1 + patches, width)
        x = x + embeddings["position_embedding"].weight[...].astype(dtype)
        x = before = model["pre_layrnorm"](x).astype(dtype)

        def step(pair, block):
            return (block(pair[0], None), pair[0]), None

        for stack in self.stacks:
            (x, before), _ = jax.lax.scan(step, (x, before), stack.block)
        if output == "penultimate":
            return before
        if output == "last":
            return x
        pooled = model["post_layernorm"](x[:, 0]).astype(dtype)  # (batch, width)
        return pooled if self.visual_projection is None else self.visual_projection(pooled)
