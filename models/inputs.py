"""What the inputs of every family must be, as errors for people; shapes alone are looked at."""

import jax
import jax.numpy as jnp

from qvdjax.errors import UserError


def join_image(latents: jax.Array, image_latents: jax.Array) -> jax.Array:
    """Latents (batch, frames, height, width, channels) and an image's, side by side along channels.

    Raises `UserError` where they do not fit.
    """
    if image_latents.shape[:-1] != latents.shape[:-1]:
        raise UserError(
            f"image_latents of shape {image_latents.shape} do not fit latents of shape {latents.shape}",
            remedy="give as many videos, frames, rows and columns",
        )
    return jnp.concatenate([latents, image_latents.astype(latents.dtype)], axis=-1)


def check_channels(latents: tuple[int, ...], channels: int, about: str = "") -> None:
    """UserError unless latents are (batch, frames, height, width, channels); `about` is added to the remedy."""
    if len(latents) != 5 or latents[-1] != channels:
        raise UserError(
            f"latents of shape {latents} do not fit this model",
            remedy=f"give (batch, frames, height, width, {channels} channels){about}",
        )


def check_patches(size: tuple[int, ...], patch: tuple[int, int, int], *, frames: str = "choose another size") -> None:
    """UserError unless a patch divides (frames, height, width); `frames` is the remedy for a number of frames."""
    for name, length, part in zip(("frames", "height", "width"), size, patch, strict=True):
        if length % part or length == 0:
            remedy = frames if name == "frames" and length else "choose another size"
            raise UserError(f"latent {name} {length} is no multiple of the patch {part}", remedy=remedy)


def check_context(context: tuple[int, ...], features: int, *, least: int = 0) -> None:
    """UserError unless text embeddings are (batch, tokens, features), of at least so many tokens."""
    if len(context) != 3 or context[-1] != features or context[1] < least:
        raise UserError(
            f"a context of shape {context} does not fit this model",
            remedy=f"give text embeddings (batch, tokens, {features})",
        )
