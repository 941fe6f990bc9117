"""The configuration of an AnimateDiff video UNet, what it refuses, and the sizes of inputs that it takes."""

import dataclasses
from typing import Literal, get_args

from models.inputs import check_channels
from models.unet_config import UNetConfig, check_sizes, levels_field
from qvdjax.errors import UserError

DOWN_TYPES = ("CrossAttnDownBlockMotion", "DownBlockMotion")
UP_TYPES = ("CrossAttnUpBlockMotion", "UpBlockMotion")
GroupNormOver = Literal["per_frame", "joint"]

_PUBLISHED = "a motion model of Stable Diffusion 1.5"
# What only one value of is published for Stable Diffusion 1.5, and which the model therefore does not do otherwise.
_ONLY = {
    "downsample_padding": 1,
    "mid_block_scale_factor": 1.0,
    "act_fn": "silu",
    "transformer_layers_per_block": 1,
    "reverse_transformer_layers_per_block": None,
    "temporal_transformer_layers_per_block": 1,
    "reverse_temporal_transformer_layers_per_block": None,
    "temporal_transformer_layers_per_mid_block": 1,
    "reverse_motion_num_attention_heads": None,
    "mid_block_layers": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
    "time_cond_proj_dim": None,
}


@dataclasses.dataclass(frozen=True)
class UNetMotionConfig(UNetConfig):
    """Fields of `config.json`; the defaults are diffusers'.

    Two fields are not diffusers', which ignores them: over what the group norms take mean and variance, a frame
    ("per_frame") or all frames of a video ("joint"). diffusers has the defaults. The original code of AnimateDiff has
    `motion_group_norm` per_frame with all three versions, and `resnet_group_norm` joint with v1.

    Versions of the published motion modules: v1 has 24 positions (`motion_max_seq_length`), v2 and v3 have 32; v2 alone
    has `use_motion_mid_block`.
    """

    sample_size: int | None = None
    in_channels: int = 4
    out_channels: int = 4
    down_block_types: tuple[str, ...] = levels_field(*[DOWN_TYPES[0]] * 3, DOWN_TYPES[1])
    up_block_types: tuple[str, ...] = levels_field(UP_TYPES[1], *[UP_TYPES[0]] * 3)
    block_out_channels: tuple[int, ...] = levels_field(320, 640, 1280, 1280)
    layers_per_block: int = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int = 1280
    transformer_layers_per_block: int = 1
    reverse_transformer_layers_per_block: None = None
    temporal_transformer_layers_per_block: int = 1
    reverse_temporal_transformer_layers_per_block: None = None
    transformer_layers_per_mid_block: int | None = None
    temporal_transformer_layers_per_mid_block: int = 1
    use_linear_projection: bool = False
    num_attention_heads: int = 8
    motion_max_seq_length: int = 32
    motion_num_attention_heads: int = 8
    reverse_motion_num_attention_heads: None = None
    use_motion_mid_block: bool = True
    mid_block_layers: int = 1
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    addition_embed_type: None = None
    addition_time_embed_dim: None = None
    projection_class_embeddings_input_dim: None = None
    time_cond_proj_dim: None = None
    resnet_group_norm: GroupNormOver = "per_frame"
    motion_group_norm: GroupNormOver = "joint"

    def __post_init__(self):
        self.refuse_others(_ONLY, _PUBLISHED)
        if self.transformer_layers_per_mid_block is not None:
            self.refuse_others({"transformer_layers_per_mid_block": 1}, _PUBLISHED)
        for name in ("resnet_group_norm", "motion_group_norm"):
            if getattr(self, name) not in get_args(GroupNormOver):
                raise UserError(
                    f"{name} is {getattr(self, name)!r}", remedy=f"choose one of {', '.join(get_args(GroupNormOver))}"
                )
        self.check_levels(DOWN_TYPES, UP_TYPES)
        self.check_divisors("norm_num_groups", "num_attention_heads", "motion_num_attention_heads")
        for width in self.block_out_channels:
            if width % 2:
                raise UserError(
                    f"block_out_channels has {width}, an odd number",
                    remedy="positions are pairs of sine and cosine, so make it even",
                )

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them; those that are not diffusers' only where they differ from it."""
        fields = self.fields_for_json("UNetMotionModel")
        for field in dataclasses.fields(self)[-2:]:
            if fields[field.name] == field.default:
                del fields[field.name]
        return fields


def check_inputs(
    config: UNetMotionConfig, latents: tuple[int, ...], timestep: tuple[int, ...], context: tuple[int, ...]
):
    """UserError unless inputs of these shapes fit: latents (batch, frames, height, width, in_channels), timestep
    (batch,), context (batch, tokens, cross_attention_dim)."""
    check_channels(latents, config.in_channels)
    frames = latents[1]
    if not 1 <= frames <= config.motion_max_seq_length:
        raise UserError(
            f"{frames} latent frames do not fit the {config.motion_max_seq_length} positions of the motion modules",
            remedy=f"use 1 to {config.motion_max_seq_length} frames",
        )
    check_sizes(config, latents, timestep, context)
