"""From a picture to all that a model is given which follows a picture and no text: Stable Video Diffusion.

As diffusers 0.42 `pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py` does it.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.encoders import EncoderFolder, encoder_shapes, load_encoder, parse_encoder_config
from models.image_prompts import LATENTS, vae_config
from models.images import PROCESSOR, for_clip_smoothed, for_vae
from models.pipeline_folder import PipelineFolder
from models.unet_spatio_temporal_config import IDS, UNetSpatioTemporalConfig
from models.vae_folders import load_vae, vae_shapes
from models.vae_tiling import Tiling
from qvdjax.checkpoint import Progress
from qvdjax.checkpoint.folder import read_json
from qvdjax.diffusion import initial_noise
from qvdjax.errors import UserError
from qvdjax.parallel import bytes_held, free

CONTEXT, TIME_IDS = "context", "added_time_ids"
USUAL_SIDES = (576, 1024)  # height and width in pixels, of diffusers' pipeline


@dataclasses.dataclass(frozen=True)
class Motion:
    """What the model is told beside the picture.

    Attributes:
        fps: Frames a second that it is to think of.
        motion_bucket: How much is to move, 0 to 255 in training.
        noise_augmentation: Deviation of the noise that is put on the picture, whose values are -1 to 1: the more, the
            less the video is like it.
    """

    fps: float = 7.0
    motion_bucket: float = 127.0
    noise_augmentation: float = 0.02

    def __post_init__(self):
        for field, least in (("fps", 1.0), ("motion_bucket", 0.0), ("noise_augmentation", 0.0)):
            value = getattr(self, field)
            if not (math.isfinite(value) and value >= least):
                raise UserError(f"{field} is {value}", remedy=f"give a number of at least {least:g}")


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedImage:
    """A picture as a model is given it, read like a file of text embeddings.

    Attributes:
        path: The pipeline that encoded it.
        name: The picture's, for the files of its videos.
        tensors: `context` (1, dim), `image_latents` (height, width, channels), `added_time_ids` (3).
    """

    path: Path
    name: str
    tensors: Mapping[str, np.ndarray]

    def read(self, name: str) -> np.ndarray:
        """One of the tensors."""
        return self.tensors[name]


@dataclasses.dataclass(frozen=True, eq=False)
class ImageAlone:
    """What a pipeline encodes such a picture with, checked against its model; no weight is read yet.

    Attributes:
        encoder: Folder of CLIP's encoder of images.
        processor: Settings of how pictures are prepared for it.
        vae: Folder of the VAE.
        motion: What else the model is told.
        side: Height and width in pixels that CLIP sees.
        dim: Features of the one vector that it makes.
        usual: Latents (frames, height, width) that are sampled where nothing is asked for.
    """

    encoder: Path
    processor: dict[str, Any]
    vae: Path
    motion: Motion
    side: int
    dim: int
    usual: tuple[int, int, int]

    @classmethod
    def open(cls, pipeline: PipelineFolder, config: UNetSpatioTemporalConfig, motion: Motion) -> "ImageAlone":
        """Look at all that encoding a picture needs.

        Raises:
            UserError: A missing or damaged component; one of another kind or width than the model's.
        """
        folder, encoder = pipeline.component("vae"), pipeline.component("image_encoder")
        vae = vae_config(folder, pipeline, config.in_channels - config.out_channels)
        opened = EncoderFolder.open(encoder)
        parsed = parse_encoder_config(opened.config)
        if opened.config["model_type"] != "clip_vision_model" or not parsed.projected:
            raise UserError(f"{encoder} makes no vector of a picture", remedy="put the model's own image encoder there")
        if parsed.projection_dim != config.text_dim:
            raise UserError(
                f"{encoder} makes {parsed.projection_dim} features of a picture, the model in {pipeline.denoiser} takes"
                f" {config.text_dim}",
                remedy="put the model's own image encoder there",
            )
        if config.ids != len(IDS):
            raise UserError(
                f"the model in {pipeline.denoiser} takes {config.ids} numbers beside a picture; {len(IDS)} are known",
                remedy="use a published Stable Video Diffusion model",
            )
        processor = read_json(pipeline.component("feature_extractor") / PROCESSOR)
        sides = (side // step for side, step in zip(USUAL_SIDES, vae.compression[1:], strict=True))
        usual = (config.num_frames, *sides)
        return cls(encoder, processor, folder, motion, parsed.image_size, parsed.projection_dim, usual)

    def shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Of what `encode` returns for latents (frames, height, width, channels)."""
        return {CONTEXT: (1, self.dim), LATENTS: latents[1:], TIME_IDS: (len(IDS),)}

    def peak_bytes(
        self, size: tuple[int, int, int], tiling: Tiling | None = None, dtype: Any = None
    ) -> dict[str, int | None]:
        """What each encoder needs of a device, weights too, by the compiler's account; arguments as for `encode`."""
        clip, vae = encoder_shapes(self.encoder, dtype=dtype), vae_shapes(self.vae)
        pixels = jax.ShapeDtypeStruct((1, self.side, self.side, 3), jnp.float32)
        video = jax.ShapeDtypeStruct((1, 1, *self._sides(vae, size), 3), jnp.float32)
        return {
            "image_encoder": bytes_held(_vector.lower(clip, pixels).compile()),
            "vae_encoder": bytes_held(_latents.lower(vae, video).compile()),
        }

    def encode(
        self, image: np.ndarray, size: tuple[int, int, int], *, dtype: Any = None, tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Encode a picture, one encoder after the other.

        The noise that is put on it is that of seed 0, whatever seeds the videos have.

        Args:
            image: uint8 (height, width, rgb), resized to the video's size whatever its proportions are.
            size: Frames, height and width of the latents that are sampled.
            dtype: Floating type of CLIP's weights; the file's by default.
            tiling: None: this VAE knows no tiles.
            progress: See `models.load`.

        Returns:
            float32 `context` (1, dim), `image_latents` (height, width, channels), not scaled by the VAE's factor, and
            `added_time_ids` (3).
        """
        pixels = for_clip_smoothed(image, self.side, self.processor)
        clip = load_encoder(self.encoder, dtype=dtype, progress=progress)
        vector = np.asarray(_vector(clip, pixels[None]), np.float32)  # h w rgb -> 1 h w rgb -> 1 dim
        free(clip)
        vae = load_vae(self.vae, progress=progress)
        sides = self._sides(vae, size)
        noise = np.asarray(initial_noise([0], (*sides, 3))[0])
        picture = for_vae(image, *sides) + np.float32(self.motion.noise_augmentation) * noise
        latents = np.asarray(_latents(vae, picture[None, None])[0, 0], np.float32)  # h w rgb -> 1 1 h w rgb -> h' w' c
        free(vae)
        motion = self.motion
        told = (motion.fps - 1, motion.motion_bucket, motion.noise_augmentation)  # one frame less, as in training
        return {CONTEXT: vector, LATENTS: latents, TIME_IDS: np.asarray(told, np.float32)}

    @staticmethod
    def _sides(vae, size: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width in pixels behind latents of a size."""
        _, down, across = vae.config.compression
        return size[1] * down, size[2] * across


@jax.jit
def _vector(clip, images: jax.Array) -> jax.Array:
    return clip(images, output="pooled")


@jax.jit
def _latents(vae, video: jax.Array) -> jax.Array:
    """(batch, 1, height, width, rgb) in -1 to 1 -> float32 (batch, 1, height', width', channels)."""
    return vae.encode(video).mode().astype(jnp.float32)
