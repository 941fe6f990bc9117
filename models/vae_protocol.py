"""What every video autoencoder is: videos to latents and back, and the latents as denoisers are given them.

A VAE is no `VideoModel`: it has no timestep and no stream of blocks, and nothing that samples or trains denoisers
applies to it. So it has a protocol and a table of its own (`models.vae_folders`). It has what `qvdjax.quantize` wants
of a model: recipes that need no calibration take it.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvdjax.errors import UserError

Size = tuple[int, int, int]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """The Gaussian over latents that an encoder gives for a video.

    Attributes:
        mean, log_variance: (batch, frames, height, width, latent channels).
    """

    mean: jax.Array
    log_variance: jax.Array

    @classmethod
    def of_moments(cls, moments: jax.Array) -> "Posterior":
        """From (..., 2 x latent channels): means, then logarithms of variances, which diffusers clips to -30 to 20."""
        mean, log_variance = jnp.split(moments, 2, axis=-1)
        return cls(mean, jnp.clip(log_variance, -30.0, 20.0))

    def mode(self) -> jax.Array:
        """The most likely latents: the mean."""
        return self.mean

    def sample(self, key: jax.Array) -> jax.Array:
        """Latents drawn from it."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + jnp.exp(0.5 * self.log_variance) * noise


class VideoVAE(nnx.Module):
    """A variational autoencoder of videos.

    Videos are (batch, frames, height, width, channels) with values in -1 to 1, latents (batch, latent frames, latent
    height, latent width, latent channels).

    Attributes:
        config: Frozen dataclass with `to_dict()`, the fields of diffusers' `config.json`, and `latent_channels`,
            `in_channels` and `compression`, how many frames, rows and columns of pixels become one of latents.

        recipe_name: The recipe that quantized it; empty for a float VAE.
        stacks: None.

    The attribute path of every Variable is its name in diffusers. Subclasses write `encode` and `decode`.
    """

    config: Any
    recipe_name: str = ""
    stacks: nnx.List = nnx.List([])

    def encode(self, video: jax.Array, **options) -> Posterior:
        """A video -> the Gaussian over its latents, which are the VAE's own: see `normalize`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to encode")

    def decode(self, latents: jax.Array, **options) -> jax.Array:
        """The VAE's own latents (see `denormalize`) -> a video."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to decode")

    def normalize(self, latents: jax.Array) -> jax.Array:
        """The VAE's own latents -> those that denoisers are trained on, of about unit variance."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its latents are scaled")

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """The latents that a denoiser samples -> the VAE's own, which `decode` takes; the inverse of `normalize`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how its latents are scaled")


def check_video(video: tuple[int, ...], channels: int, compression: Size, *, frames: str | None = None) -> None:
    """UserError unless a video of this shape can be encoded.

    Args:
        video: Its shape.
        channels: How many it must have.
        compression: Height and width must be multiples of the last two.
        frames: Remedy for this number of frames where it does not fit, None where it does.
    """
    if len(video) != 5 or video[-1] != channels or not all(video):
        raise UserError(
            f"a video of shape {video} does not fit this VAE",
            remedy=f"give (batch, frames, height, width, {channels} channels)",
        )
    for name, size, step in zip(("height", "width"), video[2:4], compression[1:], strict=True):
        if size % step:
            raise UserError(f"a video of {name} {size}", remedy=f"choose a multiple of {step}, or crop or pad it")
    if frames is not None:
        raise UserError(f"a video of {video[1]} frames", remedy=frames)


def check_latents(latents: tuple[int, ...], channels: int) -> None:
    """UserError unless latents are (batch, frames, height, width, channels) and none of these is 0."""
    if len(latents) != 5 or latents[-1] != channels or not all(latents):
        raise UserError(
            f"latents of shape {latents} do not fit this VAE",
            remedy=f"give (batch, frames, height, width, {channels} channels)",
        )
