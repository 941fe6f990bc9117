"""The configuration of an AnimateDiff video UNet, what it refuses, and the sizes of inputs that it takes."""

import dataclasses
from typing import Literal, get_args

from models.inputs import check_channels, check_context
from qvdjax.errors import UserError

DOWN_TYPES = ("CrossAttnDownBlockMotion", "DownBlockMotion")
UP_TYPES = ("CrossAttnUpBlockMotion", "UpBlockMotion")
GroupNormOver = Literal["per_frame", "joint"]

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


def _levels(*default):
    """A field of one entry a level of resolution, from the highest down; JSON has a list of any length."""
    return dataclasses.field(default_factory=lambda: default)


@dataclasses.dataclass(frozen=True)
class UNetMotionConfig:
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
    down_block_types: tuple[str, ...] = _levels(*[DOWN_TYPES[0]] * 3, DOWN_TYPES[1])
    up_block_types: tuple[str, ...] = _levels(UP_TYPES[1], *[UP_TYPES[0]] * 3)
    block_out_channels: tuple[int, ...] = _levels(320, 640, 1280, 1280)
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
        for name, only in _ONLY.items():
            if getattr(self, name) != only:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is not supported",
                    remedy=f"use a motion model of Stable Diffusion 1.5, which has {only!r}",
                )
        if self.transformer_layers_per_mid_block not in (None, 1):
            raise UserError(
                f"transformer_layers_per_mid_block {self.transformer_layers_per_mid_block!r} is not supported",
                remedy="use a motion model of Stable Diffusion 1.5, which has 1",
            )
        for name in ("resnet_group_norm", "motion_group_norm"):
            if getattr(self, name) not in get_args(GroupNormOver):
                raise UserError(
                    f"{name} is {getattr(self, name)!r}", remedy=f"choose one of {', '.join(get_args(GroupNormOver))}"
                )
        self._check_levels()

    def _check_levels(self):
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise UserError(f"{name} is {value!r}", remedy="it must be a list of one entry a level of resolution")
            object.__setattr__(self, name, tuple(value))
        for name, known in (("down_block_types", DOWN_TYPES), ("up_block_types", UP_TYPES)):
            if unknown := [kind for kind in getattr(self, name) if kind not in known]:
                raise UserError(f"{name} has {unknown[0]!r}", remedy=f"choose from {', '.join(known)}")
            if len(getattr(self, name)) != len(self.block_out_channels):
                raise UserError(
                    f"{name} has {len(getattr(self, name))} entries, block_out_channels {len(self.block_out_channels)}",
                    remedy="give both one entry a level of resolution",
                )
        if len(self.block_out_channels) > _MOST_LEVELS:
            raise UserError(
                f"block_out_channels has {len(self.block_out_channels)} levels",
                remedy=f"each halves the frames; give at most {_MOST_LEVELS}",
            )
        for width in self.block_out_channels:
            if isinstance(width, bool) or not isinstance(width, int) or not 1 <= width <= _MOST_CHANNELS:
                raise UserError(
                    f"block_out_channels has {width!r}",
                    remedy=f"it must be positive integers of at most {_MOST_CHANNELS}",
                )
            for name in ("norm_num_groups", "num_attention_heads", "motion_num_attention_heads"):
                if width % getattr(self, name):
                    raise UserError(
                        f"{name} {getattr(self, name)} does not divide {width} channels", remedy="choose a divisor"
                    )
            if width % 2:
                raise UserError(
                    f"block_out_channels has {width}, an odd number",
                    remedy="positions are pairs of sine and cosine, so make it even",
                )

    @property
    def levels(self) -> int:
        """How many resolutions there are, each half as high and wide as the one before."""
        return len(self.block_out_channels)

    @property
    def time_dim(self) -> int:
        """Features of the time embedding."""
        return 4 * self.block_out_channels[0]

    @property
    def text_dim(self) -> int:
        """Features of a text embedding."""
        return self.cross_attention_dim

    @property
    def text_tokens(self) -> int:
        """Length that CLIP's texts are padded to."""
        return 77

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's part of the inputs beside latents, timestep and context, by diffusers' names."""
        return {}

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents that the first layer makes one position of."""
        return 1, 1, 1

    @property
    def least_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the smallest latents; height and width are multiples of theirs."""
        return 1, 2 ** (self.levels - 1), 2 ** (self.levels - 1)

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them; those that are not diffusers' only where they differ from it."""
        fields = dataclasses.asdict(self)
        for field in dataclasses.fields(self)[-2:]:
            if fields[field.name] == field.default:
                del fields[field.name]
        lists = {name: [*fields[name]] for name in ("down_block_types", "up_block_types", "block_out_channels")}
        return {"_class_name": "UNetMotionModel", **fields, **lists}


_MOST_LEVELS, _MOST_CHANNELS = 8, 2**16


def check_inputs(
    config: UNetMotionConfig, latents: tuple[int, ...], timestep: tuple[int, ...], context: tuple[int, ...]
):
    """UserError unless inputs of these shapes fit: latents (batch, frames, height, width, in_channels), timestep
    (batch,), context (batch, tokens, cross_attention_dim)."""
    check_channels(latents, config.in_channels)
    _, frames, *sides, _ = latents
    if not 1 <= frames <= config.motion_max_seq_length:
        raise UserError(
            f"{frames} latent frames do not fit the {config.motion_max_seq_length} positions of the motion modules",
            remedy=f"use 1 to {config.motion_max_seq_length} frames",
        )
    least = config.least_size[1]
    for name, size in zip(("height", "width"), sides, strict=True):
        if size % least or size == 0:
            raise UserError(
                f"latent {name} {size} is no multiple of {least}",
                remedy=f"it is halved {config.levels - 1} times: choose another size",
            )
    if len(timestep) != 1:
        raise UserError(f"timesteps of shape {timestep} do not fit this model", remedy="give one a video: (batch,)")
    check_context(context, config.cross_attention_dim)
