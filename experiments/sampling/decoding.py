"""What makes videos of latents: the pipeline.json of a bench model, or the VAE of a published pipeline."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from models.pipeline import Pipeline
from models.pipeline_folder import PipelineFolder
from models.vae_folders import parse_vae_config
from models.vae_protocol import VideoVAE
from qvdjax.checkpoint.folder import CONFIG, read_json
from qvdjax.errors import UserError

VAE = "vae"


@dataclasses.dataclass(frozen=True)
class Decoder:
    """How the latents of a model become videos.

    Attributes:
        decode: Latents of one video, float32 (frames, height, width, channels) -> float32 (frames', height', width',
            rgb) in [0, 1].
        fps: Frames a second where none are asked for.
        about: What the record of a video says of it.
    """

    decode: Callable[[np.ndarray], np.ndarray]
    fps: float
    about: dict[str, Any] = dataclasses.field(default_factory=dict)


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


def of_vae(folder: Path, fps: float, progress: Callable | None = None) -> Decoder:
    """That of a VAE, which is read now and computes in the type of its file, one video after the other.

    Args:
        folder: The VAE's, see `check_vae`.
        fps: Frames a second where none are asked for.
        progress: See `models.load_vae`.
    """
    vae = models.load_vae(folder, progress=progress)
    call = jax.jit(_decode)

    def decode(latents: np.ndarray) -> np.ndarray:
        return np.asarray(call(vae, latents[None])[0])  # f h w c -> 1 f h w c -> f' h' w' rgb

    return Decoder(decode, fps, {VAE: str(folder)})


def _decode(vae: VideoVAE, latents: jax.Array) -> jax.Array:
    """float32 (batch, frames, height, width, channels) -> float32 (batch, frames', height', width', rgb) in [0, 1]."""
    video = vae.decode(vae.denormalize(latents)).astype(jax.numpy.float32)
    return (video / 2 + 0.5).clip(0, 1)
