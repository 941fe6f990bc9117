"""What the configurations of all video UNets have in common: levels of resolution, and the inputs that fit them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from models.inputs import check_channels, check_context
from qvdjax.errors import UserError

_MOST_LEVELS, _MOST_CHANNELS = 8, 2**16


def levels_field(*default):
    """A field of one entry a level of resolution, from the highest down; JSON has a list of any length."""
    return dataclasses.field(default_factory=lambda: default)


class UNetConfig:
    """Properties that every video UNet's configuration has; its fields are diffusers' and differ.

    A subclass is a frozen dataclass with the fields `block_out_channels`, `down_block_types`, `up_block_types`,
    `layers_per_block`, `in_channels` and `cross_attention_dim`.
    """

    def refuse_others(self, only: Mapping[str, Any], models: str) -> None:
        """UserError unless these fields have the one value that the model is written for; `models` names those that
        have it."""
        for name, value in only.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name} {getattr(self, name)!r} is not supported",
                    remedy=f"use {models}, which has {value!r}",
                )

    def check_levels(self, down_types: Sequence[str], up_types: Sequence[str]) -> None:
        """UserError unless widths and kinds of blocks are lists of one good entry a level; they become tuples."""
        for name in ("block_out_channels", "down_block_types", "up_block_types"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not value:
                raise UserError(f"{name} is {value!r}", remedy="it must be a list of one entry a level of resolution")
            object.__setattr__(self, name, tuple(value))
        for name, known in (("down_block_types", down_types), ("up_block_types", up_types)):
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

    def check_divisors(self, *names: str) -> None:
        """UserError unless each of these fields divides the channels of every level."""
        for width in self.block_out_channels:
            for name in names:
                if width % getattr(self, name):
                    raise UserError(
                        f"{name} {getattr(self, name)} does not divide {width} channels", remedy="choose a divisor"
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
    def latent_channels(self) -> int:
        """Channels of the latents that are sampled."""
        return self.in_channels

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

    def fields_for_json(self, class_name: str) -> dict[str, Any]:
        """The fields as `config.json` holds them, tuples as lists."""
        fields = {name: [*v] if isinstance(v, tuple) else v for name, v in dataclasses.asdict(self).items()}
        return {"_class_name": class_name, **fields}


def check_sizes(
    config: UNetConfig, latents: tuple[int, ...], timestep: tuple[int, ...], context: tuple[int, ...], *,
    channels: str = "",
) -> None:  # fmt: skip
    """UserError unless inputs of these shapes fit: latents (batch, frames, height, width, in_channels), timestep
    (batch,), context (batch, tokens, cross_attention_dim); `channels` is added to the remedy for wrong channels."""
    check_channels(latents, config.in_channels, channels)
    _, frames, *sides, _ = latents
    if frames < 1:
        raise UserError("0 latent frames", remedy="give at least one")
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
