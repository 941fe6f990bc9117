"""From a picture to what Wan's image-to-video models are given beside their text: its CLIP tokens and its latents.

As diffusers 0.42 `pipelines/wan/pipeline_wan_i2v.py` does it.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.encoders import EncoderFolder, encoder_shapes, load_encoder, parse_encoder_config
from models.images import PROCESSOR, for_clip, for_vae
from models.pipeline_folder import PipelineFolder
from models.vae_config import VAEConfig
from models.vae_folders import load_vae, parse_vae_config, vae_shapes
from models.vae_tiling import Tiling
from models.wan import WanConfig
from qvdjax.checkpoint import Progress
from qvdjax.checkpoint.folder import CONFIG, read_json
from qvdjax.errors import UserError
from qvdjax.parallel import bytes_held, free

TOKENS, LATENTS = "encoder_hidden_states_image", "image_latents"


@dataclasses.dataclass(frozen=True, eq=False)
class ImageConditions:
    """What a pipeline encodes pictures with, checked against its model; no weight is read yet.

    Attributes:
        encoder: Folder of CLIP's encoder of images; None where the model is given the picture's latents alone.
        processor: Settings of how pictures are prepared for it.
        vae: Folder of the VAE.
        compression: The VAE's.
        tokens: (image tokens, features) that the encoder makes; None without one.
    """

    encoder: Path | None
    processor: dict[str, Any]
    vae: Path
    compression: tuple[int, int, int]
    tokens: tuple[int, int] | None

    @classmethod
    def open(cls, pipeline: PipelineFolder, config: WanConfig) -> "ImageConditions":
        """Look at all that encoding a picture needs.

        Raises:
            UserError: A missing or damaged component; one of another kind or width than the model's.
        """
        folder = pipeline.component("vae")
        vae = vae_config(folder, pipeline, config.image_channels, marked=True)
        if config.image_dim is None:
            return cls(None, {}, folder, vae.compression, None)
        encoder = pipeline.component("image_encoder")
        opened = EncoderFolder.open(encoder)
        parsed = parse_encoder_config(opened.config)
        if opened.config["model_type"] != "clip_vision_model" or parsed.width != config.image_dim:
            raise UserError(
                f"{encoder} makes {parsed.width} features of a picture, the model in {pipeline.denoiser} takes"
                f" {config.image_dim} of CLIP's",
                remedy="put the model's own image encoder there",
            )
        processor = read_json(pipeline.component("image_processor") / PROCESSOR)
        tokens = (parsed.image_size // parsed.patch_size) ** 2 + 1
        return cls(encoder, processor, folder, vae.compression, (tokens, parsed.width))

    def shapes(self, latents: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Of what `encode` returns for latents (frames, height, width, channels)."""
        *size, channels = latents
        shown = {LATENTS: (*size, self.compression[0] + channels)}
        return shown if self.tokens is None else {TOKENS: self.tokens, **shown}

    def peak_bytes(
        self, size: tuple[int, int, int], tiling: Tiling | None = None, dtype: Any = None
    ) -> dict[str, int | None]:
        """What each encoder needs of a device, weights too, by the compiler's account; arguments as for `encode`."""
        found = {}
        if self.encoder is not None:
            shapes = encoder_shapes(self.encoder, dtype=dtype)
            pixels = (1, *[shapes.config.image_size] * 2, shapes.config.num_channels)
            found["image_encoder"] = bytes_held(_tokens.lower(shapes, _float32(pixels)).compile())
        found["vae_encoder"] = encoding_bytes(_latents, vae_shapes(self.vae), self._video(size), tiling)
        return found

    def _video(self, size: tuple[int, int, int]) -> tuple[int, int, int, int]:
        """(frames, height, width, rgb) of the video behind latents of a size."""
        (time, down, across), (frames, height, width) = self.compression, size
        return (frames - 1) * time + 1, height * down, width * across, 3

    def encode(
        self, image: np.ndarray, size: tuple[int, int, int], *, dtype: Any = None, tiling: Tiling | None = None,
        progress: Progress | None = None,
    ) -> dict[str, np.ndarray]:  # fmt: skip
        """Encode a picture that becomes the first frame, one encoder after the other.

        Args:
            image: uint8 (height, width, rgb), resized to the video's size whatever its proportions are.
            size: Frames, height and width of the latents that are sampled.
            dtype: Floating type of CLIP's weights; the file's by default.
            tiling: How the VAE encodes; None for whole frames.
            progress: See `models.load`.

        Returns:
            float32 `encoder_hidden_states_image` (image tokens, features), unless the model takes none, and
            `image_latents` (frames, height, width, channels): ones for the first frame, then latents.
        """
        found = {}
        if self.encoder is not None:
            pixels = for_clip(image, self.processor)
            model = load_encoder(self.encoder, dtype=dtype, progress=progress)
            found[TOKENS] = np.asarray(_tokens(model, pixels[None])[0], np.float32)  # h w c -> 1 h w c -> tokens dim
            free(model)
        video = np.zeros(self._video(size), np.float32)
        video[0] = for_vae(image, *video.shape[1:3])
        vae = load_vae(self.vae, progress=progress)
        if tiling is None:
            latents = _latents(vae, video[None])  # f h w rgb -> 1 f h w rgb -> 1 f' h' w' c
        else:
            latents = vae.normalize(vae.encode(jnp.asarray(video)[None], tiling=tiling).mode().astype(jnp.float32))
        latents = np.asarray(latents[0], np.float32)
        free(vae)
        given = np.zeros((*latents.shape[:3], self.compression[0]), np.float32)
        given[0] = 1
        found[LATENTS] = np.concatenate([given, latents], axis=-1)
        return found


@jax.jit
def _tokens(model, images: jax.Array) -> jax.Array:
    return model(images, output="penultimate")


@jax.jit
def _latents(vae, video: jax.Array) -> jax.Array:
    """(batch, frames, height, width, rgb) in -1 to 1 -> float32 (batch, frames', height', width', channels)."""
    return vae.normalize(vae.encode(video).mode().astype(jnp.float32))


def vae_config(folder: Path, pipeline: PipelineFolder, channels: int, *, marked: bool = False) -> VAEConfig:
    """The configuration of the VAE that makes latents of a picture.

    Args:
        folder: The VAE's.
        pipeline: Whose model takes them.
        channels: How many channels of a picture it takes.
        marked: Before the latents, which of the frames behind a latent frame are given, a channel each.

    Raises:
        UserError: A VAE whose pictures have another number of channels; see `parse_vae_config`.
    """
    vae = parse_vae_config(read_json(folder / CONFIG))
    made = vae.latent_channels + (vae.compression[0] if marked else 0)
    if made != channels:
        raise UserError(
            f"{folder} makes {made} channels of a picture, the model in {pipeline.denoiser} takes {channels}",
            remedy="use the VAE that belongs to the model",
        )
    return vae


def _float32(shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def encoding_bytes(latents_of, vae, video: tuple[int, int, int, int], tiling: Tiling | None) -> int | None:
    """What a VAE's encoding of a video needs of a device, weights too, by the compiler's account.

    Args:
        latents_of: The compiled function (VAE, video (batch, frames, height, width, rgb)) -> latents.
        vae: Its shapes and types.
        video: (frames, height, width, rgb).
        tiling: None for whole frames. Of tiles it is the program of one, and beside it the video.
    """
    if tiling is None:
        return bytes_held(latents_of.lower(vae, _float32((1, *video))).compile())
    frames, height, width, channels = video
    tile = tiling.larger(vae.config.compression[1:]).tile
    size = (1, frames, min(height, tile[0]), min(width, tile[1]), channels)
    held = bytes_held(latents_of.lower(vae, _float32(size)).compile())
    return None if held is None else held + 4 * math.prod(video)
