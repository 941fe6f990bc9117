"""Pictures as a video model's encoders are given them: read from a file, and at the size and scale that each wants.

What is done is what diffusers 0.42 `image_processor.py` (VaeImageProcessor.preprocess) and transformers 5.24
`models/clip/image_processing_pil_clip.py` do to a picture of Pillow's.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from qvdjax.errors import UserError

PROCESSOR = "preprocessor_config.json"
# transformers' defaults of CLIP's processor, of what decides the result.
_CLIP = {
    "do_resize": True, "do_center_crop": True, "do_rescale": True, "do_normalize": True, "resample": 3,
    "rescale_factor": 1 / 255, "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224},
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
}  # fmt: skip
LANCZOS = 1


def read_image(path: str | os.PathLike) -> np.ndarray:
    """A picture as uint8 (height, width, rgb); transparency is left out, and turned as the camera noted.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    from PIL import Image, ImageOps

    path = Path(path)
    if not path.is_file():
        raise UserError(f"the image {path} does not exist or is no file", remedy="check the path")
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"the image {path} cannot be read: {error}", remedy="save it again, as PNG or JPEG") from None


def for_vae(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 (height', width', rgb) -> float32 (height, width, rgb) in -1 to 1, whatever its proportions were."""
    return _resized(image, height, width, LANCZOS).astype(np.float32) / 127.5 - 1


def for_clip(image: np.ndarray, config: Mapping[str, Any]) -> np.ndarray:
    """As CLIP's encoder of images is given them.

    Args:
        image: uint8 (height', width', rgb).
        config: Of a `preprocessor_config.json`; what it leaves out is as in transformers.

    Returns:
        float32 (height, width, rgb) of CLIP's mean and deviation.

    Raises:
        UserError: Settings that do not describe such a processor.
    """
    settings = _settings(config)
    try:
        if settings["do_resize"]:
            image = _resized(image, *_sides(image, settings["size"]), int(settings["resample"]))
        if settings["do_center_crop"]:
            image = _cropped(image, *_rectangle(settings["crop_size"]))
        pixels = image.astype(np.float32) * np.float32(settings["rescale_factor"] if settings["do_rescale"] else 1)
        return _normalized(pixels, settings) if settings["do_normalize"] else pixels
    except (KeyError, TypeError, ValueError) as error:
        raise _unclear(error) from None


def for_clip_smoothed(image: np.ndarray, side: int, config: Mapping[str, Any]) -> np.ndarray:
    """As Stable Video Diffusion gives pictures to CLIP: blurred, then resized whatever their proportions were.

    As `_resize_with_antialiasing` of diffusers 0.42 `pipelines/stable_video_diffusion/`.

    Args:
        image: uint8 (height', width', rgb).
        side: Height and width that the encoder takes.
        config: As for `for_clip`; only mean and deviation are used.

    Returns:
        float32 (side, side, rgb) of CLIP's mean and deviation.

    Raises:
        UserError: Settings that do not describe such a processor.
    """
    down, across = (_smoothed_resize(size, side) for size in image.shape[:2])
    pixels = np.einsum("yh,xw,hwc->yxc", down, across, image / 127.5 - 1, optimize=True) / 2 + 0.5
    try:
        return _normalized(pixels, _settings(config)).astype(np.float32)
    except (TypeError, ValueError) as error:
        raise _unclear(error) from None


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a `preprocessor_config.json` that decide the result, with transformers' defaults."""
    return {**_CLIP, **{name: value for name, value in config.items() if name in _CLIP and value is not None}}


def _normalized(pixels: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    mean, deviation = (np.asarray(settings[name], np.float32) for name in ("image_mean", "image_std"))
    return (pixels - mean) / deviation


def _unclear(error: Exception) -> UserError:
    return UserError(f"{PROCESSOR} does not say how images are prepared ({error})", remedy="restore it")


def _smoothed_resize(size: int, wanted: int) -> np.ndarray:
    """Weights [wanted, size]: a Gaussian as wide as the reduction asks for, then cubic interpolation between corners.

    PyTorch's: beyond the edge the Gaussian sees the mirrored picture, the interpolation its last pixel.
    """
    deviation = max((size / wanted - 1) / 2, 0.001)
    reach = int(max(4 * deviation, 3)) // 2
    offsets = np.arange(-reach, reach + 1)
    blur = np.exp(-(offsets**2) / (2 * deviation**2))
    place = np.arange(wanted) * ((size - 1) / (wanted - 1))
    base = np.floor(place).astype(int)
    period = max(1, 2 * (size - 1))
    weights = np.zeros((wanted, size))
    for tap in (-1, 0, 1, 2):
        center = np.clip(base + tap, 0, size - 1)
        cubic = _cubic(np.abs(place - base - tap))
        for offset, share in zip(offsets, blur / blur.sum(), strict=True):
            mirrored = np.abs(center + offset) % period
            np.add.at(weights, (np.arange(wanted), np.minimum(mirrored, period - mirrored)), cubic * share)
    return weights


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Weight of a pixel so far away, at most 2, of Keys' cubic with -3/4, which is PyTorch's."""
    a = -0.75
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)


def _resized(image: np.ndarray, height: int, width: int, resample: int) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((width, height), resample=Image.Resampling(resample)))


def _sides(image: np.ndarray, size: Any) -> tuple[int, int]:
    """Height and width after resizing."""
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        return _rectangle(size)
    shortest = int(size["shortest_edge"] if isinstance(size, Mapping) else size)
    height, width = image.shape[:2]
    if height <= width:
        return shortest, int(shortest * width / height)
    return int(shortest * height / width), shortest


def _rectangle(size: Any) -> tuple[int, int]:
    return (int(size["height"]), int(size["width"])) if isinstance(size, Mapping) else (int(size), int(size))


def _cropped(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The middle; where the image is smaller, with black around it."""
    more = [max(0, wanted - had) for wanted, had in zip((height, width), image.shape, strict=False)]
    image = np.pad(image, [*((size - size // 2, size // 2) for size in more), (0, 0)])
    top, left = ((had - wanted) // 2 for wanted, had in zip((height, width), image.shape, strict=False))
    return image[top : top + height, left : left + width]
