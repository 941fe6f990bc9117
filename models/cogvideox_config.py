"""The configuration of a CogVideoX transformer, what it refuses, and the sizes of inputs that it takes."""

import dataclasses
import math

from models.inputs import check_channels, check_context, check_patches
from qvdjax.errors import UserError

# What only one value of is published, and which the model therefore does not do otherwise.
_ONLY = {
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "dropout": 0.0,
    "activation_fn": "gelu-approximate",
    "timestep_activation_fn": "silu",
}
# Tokens of the stored position table: a thousand times those of the published model, whose table has 17,776.
_MOST_POSITIONS = 2**24


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """Fields of `config.json`; the defaults are diffusers'.

    `sample_height` and `sample_width` are of latents, `sample_frames` is of video: a latent frame stands for
    `temporal_compression_ratio` of them, the first for one.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self):
        for name, only in _ONLY.items():
            if getattr(self, name) != only:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is not supported", remedy=f"CogVideoX models have {only!r}"
                )
        for name in ("patch_size_t", "ofs_embed_dim"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, int):
                raise UserError(f"{name} is {value!r}", remedy="it must be a positive integer or null")
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise UserError(
                f"ofs_embed_dim {self.ofs_embed_dim} is not time_embed_dim {self.time_embed_dim}",
                remedy="the two embeddings are added, so make them equal",
            )
        if self.in_channels < self.out_channels:
            raise UserError(
                f"{self.in_channels} channels become {self.out_channels}",
                remedy="in_channels are out_channels, or more of an image",
            )
        if min(self.sample_height, self.sample_width) < self.patch_size:
            raise UserError(
                f"sample_height {self.sample_height} and sample_width {self.sample_width} are less than a patch",
                remedy=f"make both at least patch_size {self.patch_size}",
            )
        self._check_positions()

    def _check_positions(self):
        rotary, learned = self.use_rotary_positional_embeddings, self.use_learned_positional_embeddings
        if learned and not rotary:
            raise UserError(
                "learned positional embeddings without rotary ones are not supported",
                remedy="set use_rotary_positional_embeddings: no model has the one without the other",
            )
        if self.adds_positions and self.patch[0] > 1:
            raise UserError(
                f"position tables that are added have no patches of {self.patch[0]} frames (patch_size_t)",
                remedy="such models have rotary positional embeddings alone",
            )
        # Each axis has an even number of features; frames take a quarter, columns and rows three eighths each.
        for wanted, name, size in (
            (rotary, "attention_head_dim", self.attention_head_dim),
            (self.adds_positions, "the model's width", self.width),
        ):
            if wanted and size % 16:
                raise UserError(f"{name} {size} is no multiple of 16", remedy="positions along three axes need that")
        if not learned:
            return
        if (self.sample_frames - 1) % self.temporal_compression_ratio:
            raise UserError(
                f"{self.sample_frames} sample_frames are no whole number of latent frames, "
                "for which a learned position table is made",
                remedy=f"make sample_frames 1 more than a multiple of {self.temporal_compression_ratio}",
            )
        if self.positions > _MOST_POSITIONS:
            raise UserError(
                f"the learned position table has {self.positions} tokens",
                remedy=f"check sample_height, sample_width and sample_frames; it may have {_MOST_POSITIONS}",
            )

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_dim(self) -> int:
        """Features inside the feed-forward."""
        return 4 * self.width

    @property
    def text_dim(self) -> int:
        """Features of a text embedding."""
        return self.text_embed_dim

    @property
    def latent_channels(self) -> int:
        """Channels of the latents that are sampled."""
        return self.out_channels

    @property
    def image_channels(self) -> int:
        """Channels that an image's latents add to those that are sampled; 0 without one."""
        return self.in_channels - self.out_channels

    @property
    def text_tokens(self) -> int:
        """Length that texts are padded to."""
        return self.max_text_seq_length

    @property
    def conditions(self) -> dict[str, tuple[int, ...]]:
        """Shapes of one sample's part of the inputs beside latents, timestep and context, by diffusers' names; of an
        image's latents for the smallest latents."""
        return {"image_latents": (*self.least_size, self.image_channels)} if self.image_channels else {}

    @property
    def patch(self) -> tuple[int, int, int]:
        """Frames, rows and columns of latents in a token."""
        return self.patch_size_t or 1, self.patch_size, self.patch_size

    @property
    def least_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the smallest latents that the model takes."""
        return self.sample_size if self.use_learned_positional_embeddings else self.patch

    @property
    def adds_positions(self) -> bool:
        """Whether a table is added to the tokens: a fixed one without rotary embeddings, or a learned one."""
        return self.use_learned_positional_embeddings or not self.use_rotary_positional_embeddings

    @property
    def sample_size(self) -> tuple[int, int, int]:
        """Frames, height and width of the latents that the model is made for."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        return frames, self.sample_height, self.sample_width

    def grid(self, size: tuple[int, ...]) -> tuple[int, int, int]:
        """Tokens along frames, rows and columns of latents of this (frames, height, width)."""
        frames, rows, columns = (length // patch for length, patch in zip(size, self.patch, strict=True))
        return frames, rows, columns

    @property
    def positions(self) -> int:
        """Tokens of the position table: text first, then video."""
        return self.max_text_seq_length + math.prod(self.grid(self.sample_size))

    @property
    def rope_widths(self) -> tuple[int, int, int]:
        """Features of a head that turn with frame, row and column."""
        eighth = self.attention_head_dim // 8
        return 2 * eighth, 3 * eighth, 3 * eighth

    def to_dict(self) -> dict:
        """The fields as `config.json` holds them."""
        return {"_class_name": "CogVideoXTransformer3DModel", **dataclasses.asdict(self)}


def check_sizes(config: CogVideoXConfig, latents: tuple[int, ...], context: tuple[int, ...]):
    """UserError unless inputs of these shapes fit: latents (batch, frames, height, width, in_channels), context
    (batch, tokens, text_embed_dim)."""
    size = latents[1:4]
    check_channels(latents, config.in_channels, _about_images(config))
    check_patches(size, config.patch, frames="add frames in front and drop them after sampling")
    check_context(context, config.text_embed_dim)
    _check_tables(config, size, context[1])


def _about_images(config: CogVideoXConfig) -> str:
    images = config.image_channels
    return f", of which {images} may come as image_latents" if images else ""


def _check_tables(config: CogVideoXConfig, size: tuple[int, ...], tokens: int):
    """UserError where the position tables are too small."""
    if config.adds_positions and tokens > config.max_text_seq_length:
        raise UserError(
            f"{tokens} text tokens are more than the {config.max_text_seq_length} of the position table",
            remedy="shorten the text",
        )
    if config.use_learned_positional_embeddings and size != config.sample_size:
        raise UserError(
            f"latents of {' x '.join(map(str, size))} do not fit the learned position table",
            remedy=f"this model is for {' x '.join(map(str, config.sample_size))} (frames, height, width)",
        )
    # With temporal patches positions are whole numbers up to the sample size; without, they are squeezed into it.
    _, rows, columns = config.grid(size)
    _, most_rows, most_columns = config.grid(config.sample_size)
    if config.patch_size_t is not None and (rows > most_rows or columns > most_columns):
        raise UserError(
            f"latents of {size[1]} x {size[2]} are more than the model's rotary table holds",
            remedy=f"use at most {config.sample_height} x {config.sample_width} (height, width)",
        )
