"""What a published pipeline is asked for: sizes, prompts and a picture, looked at before an encoder is read."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.sampling.conditions import IMAGE, IMAGE_ALONE, MASK, POOLED
from experiments.sampling.decoding import check_vae
from experiments.sampling.request import Settings, refuse_repeats, sampler_of
from experiments.sampling.video_size import padded_latents_of
from models.cogvideox_config import CogVideoXConfig
from models.image_alone import EncodedImage, ImageAlone, Motion
from models.image_latents import ImageLatents
from models.image_prompts import ImageConditions
from models.images import read_image
from models.pipeline_folder import PipelineFolder
from models.prompts import EncodedPrompts, PromptEncoder
from models.scheduler import sampling_defaults
from qvdjax.errors import UserError
from qvdjax.nn import check_timesteps

Pictures = ImageConditions | ImageLatents | ImageAlone


def settings_of_video(
    settings: Settings, whole: PipelineFolder | None, config, video: tuple[int, int, int]
) -> tuple[Settings, int]:
    """The settings with the latents' sizes of a video, and how many of their first frames belong to no video."""
    if (settings.frames, settings.height, settings.width) != (None, None, None):
        raise UserError("sizes of the latents are given beside the video's", remedy="give one of them")
    if whole is None:
        raise UserError(
            "only a whole pipeline with its VAE says how large the latents of a video are",
            remedy="give --frames, --height and --width of the latents",
        )
    (frames, height, width), padding = padded_latents_of(check_vae(whole, config), video, config)
    return dataclasses.replace(settings, frames=frames, height=height, width=width), padding


def check_prompts(
    folder: Path, skeleton, pictures: Pictures | None, prompts: Sequence[str] | None, seeds: Sequence[int],
    settings: Settings,
) -> None:  # fmt: skip
    """Refuse what can be refused before a large encoder is read."""
    if not seeds:
        raise UserError("no seed given", remedy="give one seed per video")
    if isinstance(pictures, ImageAlone):
        check_no_prompts(prompts, settings.negative_prompt)
    else:
        check_given(prompts)
    solver, steps = sampler_of(folder, settings)
    check_timesteps(skeleton, solver.schedule(steps).timesteps)
    _check_sizes(skeleton, _sizes(folder, pictures, settings))


def check_given(prompts: Sequence[str] | None) -> None:
    """UserError where there is no prompt, or one twice."""
    if not prompts:
        raise UserError("no prompt given", remedy="give one with --prompt, or several with --prompts")
    refuse_repeats("prompts", prompts)


def check_no_prompts(prompts: Sequence[str] | None, negative_prompt: str | None) -> None:
    """UserError for texts that are given to a model that follows a picture alone."""
    if prompts or negative_prompt:
        raise UserError("this model follows a picture and no text", remedy="leave out the prompts")


def _sizes(folder: Path, pictures: Pictures | None, settings: Settings) -> tuple[int, int, int]:
    """Frames, height and width of the latents."""
    alone = isinstance(pictures, ImageAlone)
    return settings.sizes(pictures.usual if alone else sampling_defaults(folder, solver_named=True).latents)


def stand_ins(
    folder: Path, encoder: PromptEncoder | None, pictures: Pictures | None, image: Path | None, prompts,
    settings: Settings, config,
) -> EncodedPrompts | EncodedImage:  # fmt: skip
    """Zeros of the shapes of what prompts and a picture become."""
    shown = {}
    if pictures is not None:
        shapes = pictures.shapes((*_sizes(folder, pictures, settings), config.latent_channels))
        shown = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    if encoder is None:
        return EncodedImage(folder, image.stem, shown)
    shape = (config.text_tokens, config.text_dim)
    tensors = {"context": np.zeros((len(prompts), *shape), np.float32)}
    if encoder.second is None:
        tensors["negative_context"] = np.zeros(shape, np.float32)
    else:
        pooled = {name: config.conditions[name] for name in (POOLED, MASK)}
        tensors |= {name: np.ones((len(prompts), *shape), np.float32) for name, shape in pooled.items()}
    texts = EncodedPrompts(encoder.pipeline.path, tuple(prompts), settings.negative_prompt, tensors, {}, {})
    return beside_picture(texts, shown)


def find_picture(
    whole: PipelineFolder | None, config, file: Path | None, motion: Mapping[str, float | None]
) -> tuple[Pictures | None, np.ndarray | None]:
    """What encodes a picture, and the picture; None twice where the model follows none.

    Args:
        whole: The pipeline, None where it encodes nothing.
        config: Parsed, of the model that is sampled.
        file: The picture's.
        motion: What is asked for of the fields of `Motion`; only a model that follows a picture alone is told it.

    Raises:
        UserError: A picture that is missing, cannot be read or belongs to nothing; see `ImageConditions.open`,
            `ImageLatents.open` and `ImageAlone.open`.
    """
    told = {name: value for name, value in motion.items() if value is not None}
    alone = IMAGE_ALONE in config.conditions
    if whole is None or not alone:
        _refuse_motion(told)
    if whole is None or IMAGE not in config.conditions:
        if file is not None:
            raise UserError(
                f"{file} was given to a model that follows no image, or to one without its pipeline",
                remedy="leave out --image, or name the pipeline of an image-to-video model",
            )
        return None, None
    if file is None:
        raise UserError("this model follows an image, and there is none", remedy="give its first frame with --image")
    if alone:
        pictures = ImageAlone.open(whole, config, Motion(**told))
    elif isinstance(config, CogVideoXConfig):
        pictures = ImageLatents.open(whole, config)
    else:
        pictures = ImageConditions.open(whole, config)
    return pictures, read_image(file)


def _refuse_motion(told: Mapping[str, float]) -> None:
    told = {name: value for name, value in told.items() if name != "fps"}  # which every video has
    if told:
        raise UserError(
            "only Stable Video Diffusion's pipeline is told how much is to move and how noisy its picture is",
            remedy="leave it out", items=sorted(told),
        )  # fmt: skip


def beside_picture(texts: EncodedPrompts, shown: Mapping[str, np.ndarray]) -> EncodedPrompts:
    """Every text beside the same picture."""
    many = {name: np.broadcast_to(array, (len(texts.prompts), *array.shape)) for name, array in shown.items()}
    return dataclasses.replace(texts, tensors={**texts.tensors, **many})


def _check_sizes(skeleton, sizes: tuple[int, int, int]) -> None:
    """What the model itself says of latents of a size, found by tracing it: no weight is needed."""
    config = skeleton.config
    shapes = {
        "latents": (*sizes, config.latent_channels), "timestep": (), "context": (config.text_tokens, config.text_dim),
        **config.conditions,
    }  # fmt: skip
    if IMAGE in shapes:
        shapes[IMAGE] = (*sizes, shapes[IMAGE][-1])
    inputs = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in shapes.items()}
    jax.eval_shape(lambda model, inputs: model(**inputs), skeleton, inputs)
