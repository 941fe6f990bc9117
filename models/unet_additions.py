"""What AnimateDiff takes from networks beside it: residuals of a ControlNet, and tokens of a reference image.

ControlNet: diffusers 0.42 `models/unets/unet_motion_model.py`. Reference image: magic-research/magic-animate
`magicanimate/models/mutual_self_attention.py`, `magicanimate/models/unet_controlnet.py`.
"""

from collections.abc import Sequence

import jax

from models.unet_config import UNetConfig
from qvdjax.errors import UserError

Shape = tuple[int, ...]


def skip_shapes(config: UNetConfig, latents: Shape) -> list[Shape]:
    """Shapes of the skip connections, in the order in which they are opened, beside latents of that shape."""
    batch, frames, height, width, _ = latents
    at = lambda level, channels: (batch, frames, height >> level, width >> level, channels)  # noqa: E731
    shapes = [at(0, config.block_out_channels[0])]
    for level, channels in enumerate(config.block_out_channels):
        shapes += [at(level, channels)] * config.layers_per_block
        if level < config.levels - 1:
            shapes.append(at(level + 1, channels))
    return shapes


def middle_shape(config: UNetConfig, latents: Shape) -> Shape:
    """Shape of the sample behind the blocks in the middle."""
    return skip_shapes(config, latents)[-1]


def reference_widths(config: UNetConfig) -> list[int]:
    """Features of the tokens that are looked at beside a frame's own, by each self-attention in the middle and on the
    way up that there is, in order."""
    widths = [config.block_out_channels[-1]]
    for channels, kind in zip(reversed(config.block_out_channels), config.up_block_types, strict=True):
        if kind.startswith("CrossAttn"):
            widths += [channels] * (config.layers_per_block + 1)
    return widths


def check_residuals(
    config: UNetConfig, latents: Shape, down: Sequence[jax.Array] | None, middle: jax.Array | None
) -> None:
    """UserError unless residuals fit the skip connections, and one in the middle the sample there."""
    shapes = skip_shapes(config, latents)
    if down is not None and len(down) != len(shapes):
        raise UserError(
            f"{len(down)} down_block_additional_residuals beside {len(shapes)} skip connections",
            remedy="give one for each, in the order of the way down, or take a ControlNet of this model",
        )
    names = (f"down_block_additional_residuals[{number}]" for number in range(len(shapes)))
    given = list(zip(names, down or (), shapes))
    if middle is not None:
        given.append(("mid_block_additional_residual", middle, middle_shape(config, latents)))
    for name, array, shape in given:
        if array.shape != shape:
            raise UserError(
                f"{name} of shape {array.shape} does not fit", remedy=f"give (batch, frames, height, width, c): {shape}"
            )


def check_references(config: UNetConfig, batch: int, states: Sequence[jax.Array] | None, seen: Shape | None) -> None:
    """UserError unless there are tokens for every self-attention in the middle and on the way up, of its width."""
    if states is None:
        if seen is not None:
            raise UserError("reference_seen without reference_states", remedy="give both, or neither")
        return
    widths = reference_widths(config)
    if len(states) != len(widths):
        raise UserError(
            f"{len(states)} reference_states for {len(widths)} self-attentions in the middle and on the way up",
            remedy="give the tokens that each of them sees, in the order in which they run",
        )
    for number, (array, width) in enumerate(zip(states, widths, strict=True)):
        if array.ndim != 3 or (array.shape[0], array.shape[2]) != (batch, width):
            raise UserError(
                f"reference_states[{number}] of shape {array.shape} does not fit",
                remedy=f"give (batch {batch}, tokens, {width})",
            )
    if seen not in (None, (batch,)):
        raise UserError(f"reference_seen of shape {seen} does not fit", remedy=f"give one truth a video: ({batch},)")
