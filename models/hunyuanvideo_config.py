"""The configuration of a HunyuanVideo transformer, what it refuses, and the inputs that it takes."""

import dataclasses

from models.inputs import check_channels, check_context, check_patches
from qvdjax.errors import UserError

FREQUENCIES = 256  # of the sinusoids of timestep and guidance, which no field says


@dataclasses.dataclass(frozen=True)
class HunyuanVideoConfig:
    """Fields of `config.json`; the defaults are diffusers'."""

    in_channels: int = 16
    out_channels: int = 16
    num_attention_heads: int = 24
    attention_head_dim: int = 128
    num_layers: int = 20
    num_single_layers: int = 40
    num_refiner_layers: int = 2
    mlp_ratio: float = 4.0
    patch_size: int = 2
    patch_size_t: int = 1
    qk_norm: str = "rms_norm"
    guidance_embeds: bool = True
    text_embed_dim: int = 4096
    pooled_projection_dim: int = 768
    rope_theta: float = 256.0
    rope_axes_dim: tuple[int, int, int] = (16, 56, 56)
    image_condition_type: str | None = None

    def __post_init__(self):
        object.__setattr__(self, "rope_axes_dim", tuple(self.rope_axes_dim))
        if self.image_condition_type is not None:
            raise UserError(
                f"this HunyuanVideo checkpoint is image-to-video (image_condition_type {self.image_condition_type!r}), "
                "which is not supported yet",
                remedy="use a text-to-video checkpoint",
            )
        if self.qk_norm != "rms_norm":
            raise UserError(f"unknown qk_norm {self.qk_norm!r}", remedy="HunyuanVideo models have 'rms_norm'")
        if sum(self.rope_axes_dim) != self.attention_head_dim or any(width % 2 for width in self.rope_axes_dim):
            raise UserError(
                f"rope_axes_dim {list(self.rope_axes_dim)} does not share out the {self.attention_head_dim} features "
                "of a head in pairs",
                remedy="give frames, rows and columns even numbers that add up to attention_head_dim",
            )
        if self.ffn_dim < 1:
            raise UserError(f"mlp_ratio {self.mlp_ratio} leaves no features", remedy="HunyuanVideo models have 4.0")

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Features inside the feed-forward of a block."""
        return int(self.width * self.mlp_ratio)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def least_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the smallest latents that the model takes."""
        return self.patch

    @property
    def text_dim(self) -> int:
        """Features of a text embedding."""
        return self.text_embed_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are sampled."""
        return self.in_channels

    @property
    def text_tokens(self) -> int:
        """Length that texts are padded to (Tencent-Hunyuan/HunyuanVideo:hyvideo/config.py, text-len)."""
        return 256

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's part of the inputs beside latents, timestep and context, by diffusers' names."""
        text = {"pooled_projections": (self.pooled_projection_dim,), "encoder_attention_mask": (self.text_tokens,)}
        return {**text, "guidance": ()} if self.guidance_embeds else text

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        fields = {**dataclasses.asdict(self), "rope_axes_dim": [*self.rope_axes_dim]}
        return {"_class_name": "HunyuanVideoTransformer3DModel", **fields}


def check_inputs(
    config: HunyuanVideoConfig, latents: tuple, timestep: tuple, context: tuple, mask: tuple | None,
    conditions: dict[str, tuple | None],
) -> None:  # fmt: skip
    """UserError unless inputs of these shapes fit.

    Args:
        latents: (batch, frames, height, width, in_channels).
        timestep: (batch,).
        context: (batch, tokens, text_embed_dim).
        mask: (batch, tokens), or None.
        conditions: `pooled_projections` and `guidance`, (batch, ...); None for one that was not given.
    """
    check_channels(latents, config.in_channels)
    check_patches(latents[1:4], config.patch)
    batch = latents[0]
    if timestep != (batch,):
        raise UserError(
            f"a timestep of shape {timestep} does not fit this model", remedy=f"give one a video: ({batch},)"
        )
    check_context(context, config.text_embed_dim, least=1)
    if mask is not None and mask != context[:2]:
        raise UserError(
            f"an encoder_attention_mask of shape {mask} does not fit a context of shape {context}",
            remedy=f"give {context[:2]}: true for tokens of the text, false for the padding after them",
        )
    for name, shape in conditions.items():
        if name not in config.conditions:
            if shape is not None:
                raise UserError(f"this model takes no {name}", remedy="leave it out: it has no guidance_embeds")
        elif shape != (batch, *config.conditions[name]):
            found = "lacks" if shape is None else f"has, of shape {shape},"
            raise UserError(
                f"HunyuanVideo's input {found} {name}", remedy=f"give {name} {(batch, *config.conditions[name])}"
            )
