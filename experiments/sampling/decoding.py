"""What makes videos of latents: the pipeline.json of a bench model, or the VAE of a published pipeline."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from models.pipeline import Pipeline
from models.pipeline_folder import PipelineFolder
from models.vae_folders import parse_vae_config
from models.vae_protocol import VideoVAE
from qvdjax.checkpoint.folder import CONFIG, read_json
from qvdjax.description import weight_bytes
from qvdjax.errors import UserError
from qvdjax.parallel import bytes_held

VAE = "vae"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the latents of a model become videos.

    Attributes:
        decode: Latents of one video, float32 (frames, height, width, channels) -> float32 (frames', height', width',
            rgb) in [0, 1].
        fps: Frames a second where none are asked for.
        about: What the record of a video says of it.
        memory: weight_bytes and peak_bytes of a VAE.
    """

    decode: Callable[[np.ndarray], np.ndarray]
    fps: float
    about: dict[str, Any] = dataclasses.field(default_factory=dict)
    memory: dict[str, int | None] | None = None


def of_pipeline(pipeline: Pipeline) -> Decoder:
    """That of a `pipeline.json`."""
    return Decoder(lambda latents: pipeline.decode(latents[None])[0], pipeline.fps)  # f h w c -> 1 f h w c -> f h w rgb


def check_vae(whole: PipelineFolder, config: Any) -> Path:
    """The folder of a pipeline's VAE, of which only the configuration is read.

    Args:
        whole: The pipeline.
        config: Parsed, of the model that is sampled.

    Raises:
        UserError: There is no VAE, it is not known, or its latents have another number of channels than the model's.
    """
    folder = whole.component(VAE)
    channels = parse_vae_config(read_json(folder / CONFIG)).latent_channels
    if channels != config.latent_channels:
        raise UserError(
            f"{folder} decodes latents of {channels} channels, and the model samples {config.latent_channels}",
            remedy="use the VAE that belongs to the model",
        )
    return folder


def of_vae(
    vae: VideoVAE, folder: Path, latents: tuple[int, ...], fps: float, *, tiling: models.Tiling | None = None
) -> Decoder:
    """That of a VAE, which computes in the type of its file, one video after the other.

    Args:
        vae: As it was read.
        folder: Where, see `check_vae`.
        latents: (frames, height, width, channels) of one video's, for which it is compiled.
        fps: Frames a second where none are asked for.
        tiling: Decode in tiles, each of which is a program of its own.
    """
    memory = {"weight_bytes": weight_bytes(vae), "peak_bytes": peak_bytes(vae, latents, tiling)}

    def decode(latents: np.ndarray) -> np.ndarray:
        if tiling is None:
            return np.asarray(_decode(vae, latents[None])[0])  # f h w c -> 1 f h w c -> f' h' w' rgb
        video = vae.decode(vae.denormalize(jnp.asarray(latents)[None]), tiling=tiling)
        return np.clip(np.asarray(video[0], np.float32) / 2 + 0.5, 0, 1)

    about = {VAE: str(folder), "vae_tiling": None if tiling is None else dataclasses.asdict(tiling)}
    return Decoder(decode, fps, about, memory)


def peak_bytes(vae: VideoVAE, latents: tuple[int, ...], tiling: models.Tiling | None = None) -> int | None:
    """What decoding one video needs of a device, weights too, by the compiler's account.

    Of tiles it is the program of one, and beside it the whole video twice: its rows of tiles, and they put together.

    Args:
        vae: A VAE, or its shapes and types.
        latents: (frames, height, width, channels) of one video's.
        tiling: How it is cut.

    Returns:
        Bytes, or None where the backend does not say.
    """
    frames, height, width, channels = latents
    if tiling is None:
        given = jax.ShapeDtypeStruct((1, *latents), jnp.float32)
        return bytes_held(_decode.lower(vae, given).compile())
    size = (frames, min(height, tiling.tile[0]), min(width, tiling.tile[1]), channels)
    tile = bytes_held(_decode.lower(vae, jax.ShapeDtypeStruct((1, *size), jnp.float32)).compile())
    shown = jax.eval_shape(_decode, vae, jax.ShapeDtypeStruct((1, *latents), jnp.float32))
    return None if tile is None else tile + 2 * shown.size * shown.dtype.itemsize


@jax.jit
def _decode(vae: VideoVAE, latents: jax.Array) -> jax.Array:
    """float32 (batch, frames, height, width, channels) -> float32 (batch, frames', height', width', rgb) in [0, 1]."""
    video = vae.decode(vae.denormalize(latents)).astype(jnp.float32)
    return (video / 2 + 0.5).clip(0, 1)
