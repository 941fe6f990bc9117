"""What the inputs of every family must be, as errors for people; shapes alone are looked at."""

from qvdjax.errors import UserError


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
