"""CLIP whole, as transformers' CLIPModel saves it: texts and images as vectors of one space."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.clip_text import PROJECTED as TEXT
from models.clip_vision import PROJECTED as VISION
from models.encoders import TRANSFORMERS_STEM, EncoderFolder, build_encoder
from models.images import PROCESSOR, for_clip
from models.tokenizer import TextTokenizer
from qvdjax.checkpoint import CheckpointFolder, fingerprint, load_variables
from qvdjax.checkpoint.folder import read_json
from qvdjax.errors import UserError

_PARTS = {
    "text": ("clip_text_model", TEXT, ("text_model.", "text_projection.")),
    "vision": ("clip_vision_model", VISION, ("vision_model.", "visual_projection.")),
}


@dataclasses.dataclass(frozen=True, eq=False)
class ClipPair:
    """Both encoders, with what prepares their inputs.

    Attributes:
        text, vision: The encoders, with their projections.
        tokenizer, processor: Of texts; settings for images.
        fingerprint: Of the weights.
    """

    text: nnx.Module
    vision: nnx.Module
    tokenizer: TextTokenizer
    processor: dict[str, Any]
    fingerprint: str

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ClipPair":
        """Read a folder: config.json, model.safetensors, a tokenizer's files, preprocessor_config.json.

        Raises:
            UserError: A missing or damaged file, another model.
        """
        folder = CheckpointFolder.open(path, stem=TRANSFORMERS_STEM)
        if folder.config.get("model_type") != "clip":
            raise UserError(
                f"{path} holds {folder.config.get('model_type')!r}, not CLIP", remedy="name a CLIPModel's folder"
            )
        text, vision = (_part(folder, kind) for kind in _PARTS)
        processor = read_json(Path(path) / PROCESSOR)
        return cls(text, vision, TextTokenizer(path), processor, fingerprint(folder))

    def of_texts(self, texts: list[str]) -> np.ndarray:
        """Unit vectors, float32 (texts, features); texts of more than 77 tokens are cut."""
        tokens = self.tokenizer.encode(texts, self.text.config.max_position_embeddings)
        return _unit(_pooled(self.text, tokens.numbers))

    def of_images(self, images: np.ndarray) -> np.ndarray:
        """uint8 (images, height, width, rgb) -> unit vectors, float32 (images, features)."""
        pixels = np.stack([for_clip(image, self.processor) for image in images])
        return _unit(_pooled(self.vision, pixels))


def _part(folder: CheckpointFolder, kind: str) -> nnx.Module:
    model_type, architecture, beginnings = _PARTS[kind]
    own = folder.config.get(f"{kind}_config")
    if not isinstance(own, dict):
        raise UserError(f"{folder.path}/config.json has no {kind}_config", remedy="restore the file")
    projection = folder.config.get("projection_dim", own.get("projection_dim", 512))
    config = {**own, "model_type": model_type, "architectures": [architecture], "projection_dim": projection}
    names = {key: key for key in folder.files if key.startswith(beginnings) and not key.endswith(".position_ids")}
    part = EncoderFolder(folder.path, config, folder.files, names)
    return load_variables(jax.eval_shape(lambda: build_encoder(config)), part)


@jax.jit
def _pooled(model, given: jax.Array) -> jax.Array:
    return model(given, output="pooled").astype(jnp.float32)


def _unit(vectors: jax.Array) -> np.ndarray:
    vectors = np.asarray(vectors)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
