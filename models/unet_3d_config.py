"""The configuration of ModelScope's video UNet, and what it refuses."""

import dataclasses

from models.unet_config import UNetConfig, levels_field

DOWN_TYPES = ("CrossAttnDownBlock3D", "DownBlock3D")
UP_TYPES = ("CrossAttnUpBlock3D", "UpBlock3D")

# What only one value of is published, and which the model therefore does not do otherwise.
_ONLY = {
    "downsample_padding": 1,
    "mid_block_scale_factor": 1.0,
    "act_fn": "silu",
    "num_attention_heads": None,
    "time_cond_proj_dim": None,
}


@dataclasses.dataclass(frozen=True)
class UNet3DConfig(UNetConfig):
    """Fields of `config.json`; the defaults are diffusers', and the published model's.

    `attention_head_dim` are the features of a head, so a level has as many heads as that goes into its channels
    (diffusers passes them on under each other's names). There is no table of positions: any number of frames will do.
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
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64
    num_attention_heads: None = None
    time_cond_proj_dim: None = None

    def __post_init__(self):
        self.refuse_others(_ONLY, "ModelScope's text-to-video model")
        self.check_levels(DOWN_TYPES, UP_TYPES)
        self.check_divisors("norm_num_groups", "attention_head_dim")

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("UNet3DConditionModel")
