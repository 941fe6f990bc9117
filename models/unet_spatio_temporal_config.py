"""The configuration of Stable Video Diffusion's UNet, what it refuses, and the inputs that it takes."""

import dataclasses

from models.inputs import check_context
from models.unet_config import UNetConfig, check_sizes, levels_field
from qvdjax.errors import UserError

DOWN_TYPES = ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")
UP_TYPES = ("CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal")
GROUPS = 32  # of all group norms; no field says it
IDS = ("frames a second less one", "motion bucket", "strength of the noise on the image")


@dataclasses.dataclass(frozen=True)
class UNetSpatioTemporalConfig(UNetConfig):
    """Fields of `config.json`; the defaults are diffusers', and the published models' (14 frames, XT: 25).

    `num_frames` is how many frames the model was trained on; it takes any number of them. `in_channels` are those of
    the latents that are sampled, `out_channels`, and behind them those of the image.
    """

    sample_size: int | None = None
    in_channels: int = 8
    out_channels: int = 4
    down_block_types: tuple[str, ...] = levels_field(*[DOWN_TYPES[0]] * 3, DOWN_TYPES[1])
    up_block_types: tuple[str, ...] = levels_field(UP_TYPES[1], *[UP_TYPES[0]] * 3)
    block_out_channels: tuple[int, ...] = levels_field(320, 640, 1280, 1280)
    addition_time_embed_dim: int = 256
    projection_class_embeddings_input_dim: int = 768
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    transformer_layers_per_block: int = 1
    num_attention_heads: tuple[int, ...] | int = levels_field(5, 10, 20, 20)
    num_frames: int = 25

    def __post_init__(self):
        self.refuse_others({"transformer_layers_per_block": 1}, "a published Stable Video Diffusion model")
        self.check_levels(DOWN_TYPES, UP_TYPES)
        heads = self.num_attention_heads
        if not isinstance(heads, (list, tuple)):
            heads = (heads,) * self.levels
        good = all(isinstance(h, int) and not isinstance(h, bool) and h > 0 for h in heads)
        if not good or len(heads) != self.levels:
            raise UserError(
                f"num_attention_heads is {self.num_attention_heads!r}",
                remedy=f"it must be a positive integer, or {self.levels} of them, one a level of resolution",
            )
        object.__setattr__(self, "num_attention_heads", tuple(heads))
        for width, number in zip(self.block_out_channels, heads, strict=True):
            for name, part in (("groups of the norms", GROUPS), ("num_attention_heads", number)):
                if width % part:
                    raise UserError(f"{part} {name} do not divide {width} channels", remedy="choose a multiple")
        if self.projection_class_embeddings_input_dim % self.addition_time_embed_dim:
            raise UserError(
                f"projection_class_embeddings_input_dim {self.projection_class_embeddings_input_dim} is no multiple of "
                f"addition_time_embed_dim {self.addition_time_embed_dim}",
                remedy="it has one sinusoid of that width for each number of added_time_ids",
            )
        if self.in_channels <= self.out_channels:
            raise UserError(
                f"in_channels {self.in_channels} leave none for the image beside {self.out_channels} out_channels",
                remedy="use a published Stable Video Diffusion model, which has 8 and 4",
            )

    @property
    def ids(self) -> int:
        """How many numbers `added_time_ids` holds a video."""
        return self.projection_class_embeddings_input_dim // self.addition_time_embed_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are sampled."""
        return self.out_channels

    @property
    def text_tokens(self) -> int:
        """Tokens of the context: one, of the image."""
        return 1

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's part of the inputs beside latents, timestep and context, by diffusers' names; the
        image's are for the smallest latents."""
        _, height, width = self.least_size
        image = (1, height, width, self.in_channels - self.out_channels)
        return {"added_time_ids": (self.ids,), "image_latents": image}

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return self.fields_for_json("UNetSpatioTemporalConditionModel")


def check_inputs(
    config: UNetSpatioTemporalConfig, latents: tuple[int, ...], timestep: tuple[int, ...], context: tuple[int, ...],
    added_time_ids: tuple[int, ...] | None,
) -> None:  # fmt: skip
    """UserError unless inputs of these shapes fit: latents (batch, frames, height, width, in_channels), timestep
    (batch,), context (batch, tokens, cross_attention_dim), added_time_ids (batch, ids)."""
    images = config.in_channels - config.out_channels
    check_sizes(
        config, latents, timestep, context,
        channels=f", or {config.out_channels} and the image's {images} as image_latents",
    )  # fmt: skip
    check_context(context, config.cross_attention_dim, least=1)
    if added_time_ids is None:
        raise UserError("this model needs added_time_ids", remedy=f"give (batch, {config.ids}): {', '.join(IDS)}")
    if len(added_time_ids) != 2 or added_time_ids[-1] != config.ids:
        raise UserError(
            f"added_time_ids of shape {added_time_ids} do not fit this model",
            remedy=f"give (batch, {config.ids}): {', '.join(IDS)}",
        )
