"""From a picture to the latents that CogVideoX's image-to-video models are given beside their text.

As diffusers 0.42 `pipelines/cogvideo/pipeline_cogvideox_image2video.py` does it.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.cogvideox_config import CogVideoXConfig
from models.image_prompts import LATENTS, encoding_bytes, vae_config
from models.images import for_vae
from models.pipeline_folder import PipelineFolder
from models.vae_folders import load_vae, vae_shapes
from models.vae_tiling import Tiling
from qvdjax.checkpoint import Progress
from qvdjax.parallel import free


@dataclasses.dataclass(frozen=True, eq=False)
class ImageLatents:
    """What a pipeline encodes pictures with, checked against its model; no weight is read yet.

    Attributes:
        vae: Folder of the VAE.
        compression: The VAE's.
    """

    vae: Path
    compression: tuple[int, int, int]

    @classmethod
    def open(cls, pipeline: PipelineFolder, config: CogVideoXConfig) -> "ImageLatents":
        """Look at all that encoding a picture needs.

        Raises:
            UserError: A missing or damaged VAE; one whose latents have other channels than the model's.
        """
        folder = pipeline.component("vae")
        return cls(folder, vae_config(folder, pipeline, config.image_channels).compression)

    def shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Of what `encode` returns for latents (frames, height, width, channels)."""
        return {LATENTS: latents}

    def peak_bytes(
        self, size: tuple[int, int, int], tiling: Tiling | None = None, dtype: Any = None
    ) -> dict[str, int | None]:
        """What encoding needs of a device, weights too, by the compiler's account; arguments as for `encode`."""
        return {"vae_encoder": encoding_bytes(_latents, vae_shapes(self.vae), (1, *self._sides(size), 3), tiling)}

    def encode(
        self, image: np.ndarray, size: tuple[int, int, int], *, dtype: Any = None, tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Encode a picture that becomes the first frame.

        Its latents are drawn from the Gaussian that the VAE makes of it, with seed 0 whatever seeds the videos have.

        Args:
            image: uint8 (height, width, rgb), resized to the video's size whatever its proportions are.
            size: Frames, height and width of the latents that are sampled.
            dtype: Of no use: the VAE has its file's.
            tiling: How the VAE encodes; None for whole frames.
            progress: See `models.load`.

        Returns:
            float32 `image_latents` (frames, height, width, channels): the picture's in the first frame, then zeros. Of
            version 1.5 the first frame may be one that fills a patch and belongs to no video, as in diffusers.
        """
        vae = load_vae(self.vae, progress=progress)
        pixels = jnp.asarray(for_vae(image, *self._sides(size)))[None, None]  # h w rgb -> 1 1 h w rgb
        # Tiles are programs of their own.
        latents = _latents(vae, pixels) if tiling is None else _drawn(vae, vae.encode(pixels, tiling=tiling))
        first = np.asarray(latents[0, 0], np.float32)  # 1 1 h' w' c -> h' w' c
        free(vae)
        shown = np.zeros((size[0], *first.shape), np.float32)
        shown[0] = first
        return {LATENTS: shown}

    def _sides(self, size: tuple[int, int, int]) -> tuple[int, int]:
        """Height and width in pixels behind latents of a size."""
        return size[1] * self.compression[1], size[2] * self.compression[2]


@jax.jit
def _latents(vae, video: jax.Array) -> jax.Array:
    """(batch, 1, height, width, rgb) in -1 to 1 -> float32 (batch, 1, height', width', channels)."""
    return _drawn(vae, vae.encode(video))


def _drawn(vae, posterior) -> jax.Array:
    return vae.normalize_image(posterior.sample(jax.random.key(0)).astype(jnp.float32))
