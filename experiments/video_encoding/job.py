"""Encoding a folder of clips: first their captions, then each clip, then one folder of all that went well."""

import dataclasses
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import models
from experiments.sampling.decoding import check_vae
from experiments.sampling.video_size import latents_of, usual_video
from experiments.training.latents import MANIFEST, write_folder
from experiments.video_encoding.clips import ClipFile, find_clips, read_frames
from experiments.video_encoding.work import Work
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder
from models.scheduler import sampling_defaults
from models.vae_folders import open_vae_folder
from models.vae_protocol import VideoVAE
from qvdjax.checkpoint import CheckpointFolder, Progress, fingerprint
from qvdjax.errors import UserError

_SHARD_BYTES = 2**28


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What is encoded how: the same in all processes."""

    video: tuple[int, int, int]
    fps: float | None
    draw: bool
    dtype: str | None


def encode_videos(
    clips_folder: Path,
    pipeline: Path,
    output: Path,
    *,
    video: tuple[int, int, int] | None = None,
    fps: float | None = None,
    draw: bool = False,
    dtype: str | None = None,
    batch: int = 4,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Make the folder that `qvdjax train` reads of clips and captions.

    What is done is kept in `output`.work: the same command goes on after an interruption, and may run several times at
    once, on hosts that share the folder too. Whichever process is the last to finish writes `output` and removes it.

    Args:
        clips_folder: See `find_clips`.
        pipeline: Of diffusers, whose text encoder and VAE are used.
        output: The new folder.
        video: (frames, height, width) of what is taken of each clip; what its family is published with by default.
        fps: Frames a second that are taken of clips; the family's by default, 0 takes every frame.
        draw: Draw latents from the VAE's Gaussian instead of taking its mean. The draw follows from the clip's name.
        dtype: Floating type of text encoder and VAE; the files' by default.
        batch: Captions encoded at once.
        progress: Called with (stage, done, total).

    Returns:
        {output, written, clips, encoded, failed: [{clip, error}], left, cut, video, latents, fps, seconds}: `written`
        is false where other processes still encode `left` clips; `encoded` counts those of all processes; `cut` says
        how many tokens of which caption were too many.

    Raises:
        UserError: A folder that is missing, taken or begun with other settings; a pipeline that lacks something; a size
            that its VAE or its model does not take; no clip could be encoded.
    """
    started = time.perf_counter()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists", remedy="choose another name or delete it first")
    if batch < 1:
        raise UserError(f"a batch of {batch} captions", remedy="encode at least one at once")
    whole = PipelineFolder.open(pipeline)
    encoder, config = PromptEncoder.open(whole), models.parse_config(CheckpointFolder.open(whole.denoiser).config)
    if encoder.second is not None:
        raise UserError(
            f"{pipeline} is of a model that is given more of a text than a folder of latents holds",
            remedy="train a model of another family",
        )
    vae_folder = check_vae(whole, config)
    defaults = sampling_defaults(whole.denoiser, solver_named=True)
    video = usual_video(vae_folder, defaults.latents) if video is None else video
    latents = latents_of(vae_folder, video, config)
    fps = defaults.fps if fps is None else fps
    settings = _Settings(video, None if fps == 0 else fps, draw, dtype)
    clips = find_clips(clips_folder)
    work = Work.open(
        output.with_name(f"{output.name}.work"),
        {
            **dataclasses.asdict(settings), "video": list(video),
            "vae": fingerprint(open_vae_folder(vae_folder)), "text_encoder": encoder.fingerprint(),
        },
    )  # fmt: skip
    cut = _encode_captions(work, encoder, clips, settings, batch, progress)
    _encode_clips(work, vae_folder, clips, settings, progress)

    failed = [{"clip": clip.name, "error": error} for clip in clips if (error := work.failure(clip))]
    bad = {entry["clip"] for entry in failed}
    good = [clip for clip in clips if clip.name not in bad]
    left = sum(not work.is_done(clip) for clip in good)
    if not good:
        raise UserError(
            f"none of the {len(clips)} clips in {clips_folder} could be encoded", remedy="mend them",
            items=[entry["error"] for entry in failed],
        )  # fmt: skip
    if not left:
        _gather(work, good, output)
    return {
        "output": str(output),
        "written": not left,
        "clips": len(clips),
        "encoded": len(good) - left,
        "failed": failed,
        "left": left,
        "cut": cut,
        "video": list(video),
        "latents": list(latents),
        "fps": settings.fps,
        "seconds": time.perf_counter() - started,
    }


def _encode_captions(
    work: Work, encoder: PromptEncoder, clips: Sequence[ClipFile], settings: _Settings, batch: int,
    progress: Progress | None,
) -> dict[str, int]:  # fmt: skip
    """Encode the captions that are not there yet; one process does it, and the others wait for it."""
    captions = {}
    for clip in clips:
        try:
            captions[clip.caption()] = None
        except UserError as error:
            work.save_failure(clip, error)
    with work.held("texts", wait=True):
        missing = [caption for caption in captions if not work.text_file(caption).is_file()]
        if missing:
            embedded = encoder.encode_each(missing, dtype=settings.dtype, batch=batch, progress=progress)
            for caption, context, cut in embedded:
                work.save_text(caption, np.asarray(context, np.float32), cut)
    return {caption: cut for caption in captions if (cut := work.cut(caption))}


def _encode_clips(
    work: Work, vae_folder: Path, clips: Sequence[ClipFile], settings: _Settings, progress: Progress | None
) -> None:
    """Encode the clips that no process has encoded or is at."""
    vae = None
    for number, clip in enumerate(clips, 1):
        if not _is_settled(work, clip):
            with work.claim(clip) as mine:
                if mine and not _is_settled(work, clip):
                    if vae is None:
                        vae = models.load_vae(vae_folder, dtype=settings.dtype, progress=progress)
                    try:
                        work.save_latents(clip, _latents(vae, clip, settings))
                    except UserError as error:
                        work.save_failure(clip, error)
        if progress:
            progress("clips", number, len(clips))


def _is_settled(work: Work, clip: ClipFile) -> bool:
    return work.is_done(clip) or work.failure(clip) is not None


def _latents(vae: VideoVAE, clip: ClipFile, settings: _Settings) -> np.ndarray:
    """float32 (frames, height, width, channels) of one clip."""
    frames = read_frames(clip.path, settings.video, settings.fps)
    seed = np.uint32(zlib.crc32(clip.name.encode())) if settings.draw else None
    latents = np.asarray(_encode(vae, frames[None], seed)[0])  # f h w rgb -> 1 f h w rgb -> f' h' w' c
    if not np.isfinite(latents).all():
        raise UserError(f"the latents of {clip.path} are not finite", remedy="encode with --dtype float32")
    return latents


@jax.jit
def _encode(vae: VideoVAE, frames: jax.Array, seed: jax.Array | None) -> jax.Array:
    """uint8 (batch, frames, height, width, rgb) -> float32 (batch, frames', height', width', channels), normalised."""
    posterior = vae.encode(frames.astype(jnp.float32) / 127.5 - 1)
    latents = posterior.mode() if seed is None else posterior.sample(jax.random.key(seed))
    return vae.normalize(latents).astype(jnp.float32)


def _gather(work: Work, clips: Sequence[ClipFile], output: Path) -> None:
    """Write the folder, unless another process has, and remove what it was made of."""

    def examples():
        for clip in clips:
            caption = clip.caption()
            yield {"latents": work.latents(clip), "context": work.text(caption), "prompt": caption}

    with work.held("output", wait=True):
        if (output / MANIFEST).exists():
            return
        size = sum(array.nbytes for name, array in next(examples()).items() if name != "prompt")
        write_folder(output, examples(), shard=max(1, _SHARD_BYTES // size))
        shutil.rmtree(work.path, ignore_errors=True)
