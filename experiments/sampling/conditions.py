"""What a file of embeddings says about its texts or images, for models that are given more than latents and a text."""

import math
from typing import Any

import numpy as np

from models.image_alone import EncodedImage
from models.prompts import EncodedPrompts
from qvdjax.checkpoint import SafetensorsFile
from qvdjax.errors import UserError

# diffusers' names of conditions
GUIDANCE, MASK, POOLED, IMAGE, IMAGE_TOKENS = (
    "guidance", "encoder_attention_mask", "pooled_projections", "image_latents", "encoder_hidden_states_image",
)  # fmt: skip
# What only a model has that is given an image in the place of a text.
IMAGE_ALONE = "added_time_ids"


def check_guidance(settings: Any, *, embedded: bool) -> None:
    """UserError for guidance that a model with conditions cannot be given."""
    if not math.isfinite(1.0 if settings.guidance_scale is None else settings.guidance_scale):
        raise UserError(f"the guidance scale is {settings.guidance_scale}", remedy="give a finite number")
    if not embedded:
        raise UserError(
            "guidance between two texts is not done for models with a pooled embedding of the text",
            remedy="set the guidance scale to 1",
        )
    varies = (settings.dynamic_guidance, settings.first_frame_guidance)
    if varies != (None, None) or settings.guidance_until:
        raise UserError(
            "this model is given its guidance scale as an input, the same at every step",
            remedy="leave out --dynamic-guidance, --guidance-until and --first-frame-guidance",
        )


def read_conditions(
    file: SafetensorsFile | EncodedPrompts | EncodedImage, config: Any, texts: tuple[int, int]
) -> dict[str, np.ndarray]:
    """float32 (texts, ...) of what the file says about its texts beside their tokens.

    `encoder_attention_mask`, ones before zeros, may be left out where no text is padded. `image_latents` are of any
    height and width, (height, width, channels) or (texts, 1, height, width, channels); of a model that is shown frames
    of a video of any number too, (frames, height, width, channels) or (texts, frames, ...).

    Args:
        file: What is said there is (...) for all texts, or (texts, ...).
        config: The model's.
        texts: (texts, tokens).

    Raises:
        UserError: A condition that is missing, not finite or of another shape.
    """
    conditions = {}
    for name, shape in config.conditions.items():
        if name == GUIDANCE or (name == MASK and MASK not in file.tensors):
            continue
        if name not in file.tensors:
            raise UserError(
                f"{file.path} holds no tensor {name!r}", remedy=f"store it beside `context`, {shape} for each text"
            )
        shape = texts[1:] if name == MASK else shape
        values = file.read(name).astype(np.float32)
        if name == IMAGE:
            values = values[None] if values.ndim == 3 else values  # h w c -> 1 h w c
            # Of any height and width, and of many frames where the model does not repeat one.
            shape = (values.shape[-4] if IMAGE_ALONE not in config.conditions else 1, *values.shape[-3:-1], shape[-1])
        if name == IMAGE_TOKENS:
            shape = (values.shape[-2] if values.ndim > 1 else 0, shape[-1])
        values = values[None] if values.ndim == len(shape) else values  # (...) -> (1, ...)
        if values.shape == (1, *shape):  # the same for every text
            values = np.broadcast_to(values, (texts[0], *shape))
        if values.shape != (texts[0], *shape) or not np.isfinite(values).all():
            raise UserError(
                f"{file.path}: {name} of shape {values.shape} is no finite {(texts[0], *shape)} array",
                remedy="make the file again",
            )
        conditions[name] = values
    mask = conditions.get(MASK)
    if mask is not None and not (np.isin(mask, (0, 1)).all() and (np.diff(mask, axis=1) <= 0).all()):
        raise UserError(f"{file.path}: {MASK} is not ones before zeros", remedy="pad texts at their end")
    return conditions


def read_context(
    file: SafetensorsFile | EncodedPrompts | EncodedImage, name: str, default: np.ndarray | None = None
) -> np.ndarray:
    """float32 (texts, tokens, dim); without the tensor `default`, or `UserError` where that is None."""
    if name not in file.tensors and default is not None:
        return default
    if name not in file.tensors:
        raise UserError(
            f"{file.path} holds no tensor {name!r}",
            remedy="store `context` and, for guidance, `negative_context`, or set the guidance scale to 1",
        )
    values = file.read(name).astype(np.float32)
    if values.ndim not in (2, 3) or 0 in values.shape or not np.isfinite(values).all():
        raise UserError(
            f"{file.path}: {name} of shape {values.shape} is no finite (texts, tokens, dim) array",
            remedy="make the file again",
        )
    return values[None] if values.ndim == 2 else values  # (tokens, dim) -> (1, tokens, dim)
