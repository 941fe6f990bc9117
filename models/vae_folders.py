"""The VAEs that are known, and how their folders are read and written, without PyTorch.

They have a table of their own beside `models.FAMILIES`, because what reads that one (quantizing, sampling, training,
planning) works on denoisers; a VAE is none (see `models.vae_protocol`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from models.families import FAMILIES, Family, parse_fields
from models.vae_cogvideox import AutoencoderKLCogVideoX, CogVideoXVAEConfig
from models.vae_hunyuanvideo import AutoencoderKLHunyuanVideo, HunyuanVideoVAEConfig
from models.vae_image import AutoencoderKL, ImageVAEConfig
from models.vae_protocol import VideoVAE
from models.vae_temporal import AutoencoderKLTemporalDecoder, TemporalVAEConfig
from models.vae_wan import AutoencoderKLWan, WanVAEConfig
from qvdjax.checkpoint import CheckpointFolder, Progress, load_variables, save_variables
from qvdjax.errors import UserError

VAES = {
    "AutoencoderKL": Family("image-vae", ImageVAEConfig, AutoencoderKL),
    "AutoencoderKLCogVideoX": Family("cogvideox-vae", CogVideoXVAEConfig, AutoencoderKLCogVideoX),
    "AutoencoderKLHunyuanVideo": Family("hunyuanvideo-vae", HunyuanVideoVAEConfig, AutoencoderKLHunyuanVideo),
    "AutoencoderKLTemporalDecoder": Family(
        "stable-video-diffusion-vae", TemporalVAEConfig, AutoencoderKLTemporalDecoder
    ),
    "AutoencoderKLWan": Family("wan-vae", WanVAEConfig, AutoencoderKLWan),
}


def build_vae(config: Mapping[str, Any], *, key: jax.Array | None = None, dtype=jnp.float32) -> VideoVAE:
    """A freshly initialised VAE; under `jax.eval_shape` it takes no memory.

    Args:
        config: Fields of `config.json`.
        key: For the initial weights, `jax.random.key(0)` by default.
        dtype: Of all parameters.

    Raises:
        UserError: An architecture that is no VAE or not known, an unknown field, or a value that does not fit.
    """
    name = config.get("_class_name")
    if name not in VAES:
        what = "a denoiser, not a VAE" if name in FAMILIES else "not a VAE that is known"
        raise UserError(f"config.json names {name!r}, which is {what}", remedy=f"known: {', '.join(VAES)}")
    family = VAES[name]
    parsed = parse_fields(dict(config), family.config, family.name)
    return family.model(parsed, key=jax.random.key(0) if key is None else key, dtype=dtype)


def load_vae(
    path: str | os.PathLike, *, dtype: Any = None, sharding: jax.sharding.Sharding | None = None,
    progress: Progress | None = None,
) -> VideoVAE:  # fmt: skip
    """Read a VAE's folder as diffusers writes it; of a pipeline's folder that is the one named `vae`.

    Args:
        path: The folder (config.json and safetensors, whole or in shards).
        dtype: Floating type of the weights, in which it also computes; None keeps the file's. Norms become no narrower
            than float32.
        sharding: Where the weights lie, whole; None: on the first device.
        progress: Called with (stage, bytes done, bytes in all).

    Raises:
        UserError: A missing, truncated or corrupt file; unknown, missing or mis-shaped keys; weights that are not
            finite; an architecture that is no VAE or not known.
    """
    folder = CheckpointFolder.open(path)
    abstract = jax.eval_shape(lambda: build_vae(folder.config))
    dtype = None if dtype is None else jnp.dtype(dtype)
    return load_variables(abstract, folder, dtype=dtype, shardings=sharding, progress=progress)


def save_vae(
    vae: VideoVAE, path: str | os.PathLike, *, overwrite: bool = False, progress: Progress | None = None
) -> None:
    """Write a VAE as a folder that `load_vae` and diffusers read back bit for bit.

    Raises:
        UserError: The target exists and `overwrite` is not set, it cannot be written, or the disk is full.
    """
    save_variables(vae, path, vae.config.to_dict(), overwrite=overwrite, progress=progress)
