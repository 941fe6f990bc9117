"""The job of `qvdjax encode-prompts`: from prompts to a file of text embeddings, which published models sample from."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import models
from experiments.sampling.conditions import IMAGE_ALONE
from experiments.sampling.decoding import check_vae
from experiments.sampling.output import LATENTS, check_output
from experiments.sampling.published import Pictures, check_given, check_no_prompts, find_picture
from experiments.sampling.video_size import Size, padded_latents_of
from models.image_alone import ImageAlone
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder
from models.scheduler import sampling_defaults
from qvdjax.checkpoint import CheckpointFolder, Progress, TensorSource, write_file
from qvdjax.errors import UserError
from qvdjax.parallel import make_mesh


def encode_prompts(
    folder: Path,
    output: Path,
    prompts: Sequence[str] | None,
    *,
    negative_prompt: str | None = None,
    image: Path | None = None,
    video: tuple[int, int, int] | None = None,
    fps: float | None = None,
    motion_bucket: float | None = None,
    noise_augmentation: float | None = None,
    recipe: str | None = None,
    dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Encode prompts with a pipeline's own text encoder and write what its model is sampled from.

    A file that exists is replaced when the new one is complete.

    Args:
        folder: A pipeline folder of diffusers.
        output: FILE.safetensors: `context` (texts, tokens, dim) and `negative_context` (tokens, dim), in the type that
            the encoder computes in; the texts stand in its header. Of a picture alone, what its encoders make of it.
        prompts: Different texts, at least one; none for a model that follows a picture alone.
        negative_prompt: What guidance leads away from; by default the family's published text, often the empty one.
        image: A picture that becomes the first frame, of a pipeline that follows one; what its encoders make of it is
            written too, for all texts.
        video: (frames, height, width) of the video that follows it, in pixels; the family's by default.
        fps, motion_bucket, noise_augmentation: What a model that follows a picture alone is told, see
            `models.image_alone.Motion`.
        recipe: Quantize the encoder first, by a recipe that needs no calibration.
        dtype: Floating type of the encoder's weights; the file's by default.
        mesh: Devices to spread the encoder over, axis name to size; by default the first one.
        batch: Texts encoded at once.
        progress: Called with (stage, done, total).

    Returns:
        {file, texts, tokens, dim, dtype, cut, text_encoder, image, seconds}; `cut` says how many tokens of which text
        were too many, `image` what shapes the picture became. `text_encoder` is None where there are no texts.

    Raises:
        UserError: No prompt, or one twice; see `models.prompts.PromptEncoder`; an output that cannot be written.
    """
    if batch < 1:
        raise UserError(f"a batch of {batch} texts", remedy="encode at least one at once")
    if output.suffix != LATENTS:
        raise UserError(f"{output} is not {LATENTS}", remedy=f"name a file ending in {LATENTS}")
    check_output(output, decodes=False)
    whole = PipelineFolder.open(folder)
    config = models.parse_config(CheckpointFolder.open(whole.denoiser).config)
    motion = {"fps": fps, "motion_bucket": motion_bucket, "noise_augmentation": noise_augmentation}
    if IMAGE_ALONE in config.conditions:
        check_no_prompts(prompts, negative_prompt)
        pictures, picture = find_picture(whole, config, image, motion)
        return _encode_picture(pictures, picture, _size(whole, config, pictures, video), output, dtype, progress)
    check_given(prompts)
    if fps is not None:
        raise UserError("this model is told no frames a second", remedy="leave out --fps")
    encoder = PromptEncoder.open(whole)
    if negative_prompt is None:
        negative_prompt = sampling_defaults(whole.denoiser, solver_named=True).negative_prompt
    pictures, picture, size = _beside_texts(whole, config, image, video, motion)
    started, devices = time.perf_counter(), None if mesh is None else make_mesh(mesh)
    with contextlib.nullcontext() if devices is None else jax.set_mesh(devices):
        texts = encoder.encode(
            prompts, negative_prompt, recipe=recipe, dtype=dtype, mesh=devices, batch=batch, progress=progress
        )
    shown = {} if pictures is None else pictures.encode(picture, size, dtype=dtype, progress=progress)
    said = {"prompts": json.dumps(texts.prompts), "negative_prompt": texts.negative_prompt}
    _write(output, {**texts.tensors, **shown}, {**said, "text_encoder": json.dumps(texts.encoder)})
    count, length, width = texts.tensors["context"].shape
    return {
        "file": str(output),
        "texts": count,
        "tokens": length,
        "dim": width,
        "dtype": str(texts.tensors["context"].dtype),
        "cut": texts.cut,
        "text_encoder": texts.encoder,
        "image": {name: list(values.shape) for name, values in shown.items()},
        "seconds": time.perf_counter() - started,
    }


def _encode_picture(
    pictures: ImageAlone, picture: np.ndarray, size: tuple[int, int, int], output: Path, dtype: str | None,
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """As `encode_prompts`, of a picture that no text stands beside."""
    started = time.perf_counter()
    shown = pictures.encode(picture, size, dtype=dtype, progress=progress)
    _write(output, shown, {"motion": json.dumps(dataclasses.asdict(pictures.motion))})
    length, width = shown["context"].shape
    return {
        "file": str(output), "texts": 0, "tokens": length, "dim": width, "dtype": str(shown["context"].dtype),
        "cut": {}, "text_encoder": None, "image": {name: list(values.shape) for name, values in shown.items()},
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


def _write(output: Path, arrays: Mapping[str, np.ndarray], said: dict[str, str]) -> None:
    tensors = [
        TensorSource(name, values.shape, values.dtype, lambda values=values: values) for name, values in arrays.items()
    ]
    write_file(output, tensors, said)


def _beside_texts(whole: PipelineFolder, config, file: Path | None, video, motion: Mapping[str, float | None]):
    """What encodes a picture, the picture, and the size of the latents that follow it; None thrice without one."""
    if file is None and video is not None:
        raise UserError("a video's size says nothing about texts", remedy="leave out --video, or give --image")
    if file is None:  # its texts are of use without the picture
        return *find_picture(None, config, None, motion), None
    pictures, picture = find_picture(whole, config, file, motion)
    return pictures, picture, _size(whole, config, pictures, video)


def _size(whole: PipelineFolder, config, pictures: Pictures, video: Size | None) -> Size:
    """Of the latents, for a video in pixels or as the family is published; also frames that belong to no video."""
    if video is None and isinstance(pictures, ImageAlone):
        return pictures.usual
    if video is None:
        return sampling_defaults(whole.denoiser, solver_named=True).latents
    return padded_latents_of(check_vae(whole, config), video, config)[0]
