"""Sizes of videos and of their latents, as a pipeline's VAE and its model take them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.inputs import check_patches
from models.vae_folders import build_vae, parse_vae_config
from qvdjax.checkpoint.folder import CONFIG, read_json
from qvdjax.errors import UserError

Size = tuple[int, int, int]
"""Frames, height and width."""


def latents_of(vae_folder: Path, video: Size, config: Any) -> Size:
    """The latents' size of a video; the VAE's configuration is read, none of its weights.

    Args:
        vae_folder: The VAE's.
        video: In pixels.
        config: Parsed, of the model that takes the latents.

    Raises:
        UserError: Numbers of frames that the VAE does not take (Wan's: 4n + 1), sides that are no multiples, latents
            that the model's patches do not divide.
    """
    if min(video) < 1:
        raise UserError(f"a video of {_said(video)}", remedy="give frames, height and width of at least 1")
    fields = read_json(vae_folder / CONFIG)
    vae = jax.eval_shape(lambda: build_vae(fields))
    pixels = jax.ShapeDtypeStruct((1, *video, vae.config.in_channels), jnp.float32)
    latents = jax.eval_shape(lambda vae, pixels: vae.encode(pixels).mode(), vae, pixels).shape[1:4]
    try:
        check_patches(latents, config.patch)
    except UserError as error:
        step = [part * factor for part, factor in zip(config.patch, vae.config.compression, strict=True)]
        raise UserError(
            f"a video of {_said(video)}: {error.message}",
            remedy=f"make height and width multiples of {step[1]} and {step[2]}",
        ) from None
    return latents


def padded_latents_of(vae_folder: Path, video: Size, config: Any) -> tuple[Size, int]:
    """As `latents_of`, with frames put before them where the model's patches do not divide theirs, and how many.

    CogVideoX 1.5's patches are of two frames; as in diffusers' pipeline the frame more is sampled, and left out of the
    video.
    """
    fields = read_json(vae_folder / CONFIG)
    time, part = parse_vae_config(fields).compression[0], config.patch[0]
    padding = -((video[0] - 1) // time + 1) % part
    return latents_of(vae_folder, (video[0] + padding * time, *video[1:]), config), padding


def usual_video(vae_folder: Path, latents: Size | None) -> Size:
    """The video's size of the latents that a family is published with. Raises `UserError` where there are none."""
    if latents is None:
        raise UserError("this model's family has no usual size", remedy="give --video, such as 81x480x832")
    time, *sides = parse_vae_config(read_json(vae_folder / CONFIG)).compression
    height, width = (size * side for size, side in zip(latents[1:], sides, strict=True))
    return (latents[0] - 1) * time + 1, height, width


def _said(video: Size) -> str:
    return f"{video[0]} frames of {video[1]} x {video[2]}"
