"""Sampling a model folder: load, compile, sample, write."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

import models
from experiments.sampling.decoding import VAE, of_pipeline, of_vae
from experiments.sampling.memory_plan import HOST, MemoryPlan, plan_memory
from experiments.sampling.opened import Opened, open_sampled
from experiments.sampling.output import VIDEO, output_paths, write_video
from experiments.sampling.previews import Previews
from experiments.sampling.published import (
    Pictures,
    beside_picture,
    check_prompts,
    find_picture,
    settings_of_video,
    stand_ins,
)
from experiments.sampling.record import device_record, memory_record, quantization_record, settings_record
from experiments.sampling.request import (
    Request,
    Settings,
    request_from_context,
    request_from_embeddings,
    request_from_pipeline,
)  # fmt: skip
from experiments.sampling.running import Progress, inputs_of, precise_of, sample_all
from models.folders import abstract_model, used_tensors
from models.image_alone import EncodedImage, ImageAlone
from models.pipeline import FILE
from models.prompts import AT_ONCE, EncodedPrompts, PromptEncoder
from models.scheduler import sampling_defaults
from qvdjax.checkpoint import CheckpointFolder, loaded_shapes
from qvdjax.description import weight_bytes
from qvdjax.errors import UserError
from qvdjax.nn import check_timesteps
from qvdjax.parallel import make_mesh

DENOISER = "denoiser"


def sample_folder(
    folder: Path,
    output: Path,
    *,
    prompts: Sequence[str] | None = None,
    seeds: Sequence[int] = (0,),
    steps: int | None = None,
    guidance_scale: float | None = None,
    shift: float | None = None,
    solver: str | None = None,
    sigma_grid: str | None = None,
    negative_prompt: str | None = None,
    dynamic_guidance: str | None = None,
    guidance_until: float = 0.0,
    first_frame_guidance: float | None = None,
    context_file: Path | None = None,
    denoiser: Path | None = None,
    image: Path | None = None,
    names: Literal["prompt", "vbench"] = "prompt",
    frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    video: tuple[int, int, int] | None = None,
    fps: float | None = None,
    motion_bucket: float | None = None,
    noise_augmentation: float | None = None,
    scale: int | None = None,
    dtype: str | None = None,
    execution: str | None = None,
    mesh: Mapping[str, int] | None = None,
    batch: int = 8,
    step_loop: bool = False,
    previews: int | None = None,
    memory_limit: int | None = None,
    one_batch: bool = False,
    float_attention: tuple[int, int] = (0, 0),
    progress: Progress | None = None,
) -> dict:
    """Sample every prompt at every seed and write each video, with a JSON file beside it.

    Files that exist under the names to be written are replaced.

    Args:
        folder: A model folder, quantized or not. With a `pipeline.json` it samples prompts to videos; without
            one (published models) it samples a file of text embeddings to latents. Or the folder of a published
            pipeline, whose text encoder encodes the prompts and is freed before the model that samples is read, and
            whose VAE is read when that is freed.
        output: FILE.mp4, or FILE.safetensors for the latents. Several videos are written beside it as
            `FILE-<prompt>-<seed>.mp4`.
        prompts: Sentences; with a `pipeline.json` by default the first shipped caption of the moving shapes.
        seeds: Of the initial noise. A seed means the same video in any batch and on any number of devices, up
            to rounding.
        steps, guidance_scale, shift, solver, sigma_grid, negative_prompt: The folder's by default; without a
            `pipeline.json` what its scheduler or its family says, see `models.scheduler`.
        dynamic_guidance: Let the guidance vary over the steps, see `qvdjax.diffusion.guidance_scales`.
        guidance_until: Timestep below which steps are not guided, see `qvdjax.diffusion.guidance.guided_steps`.
        first_frame_guidance: Let the guidance rise over the frames from this, see `qvdjax.diffusion.guidance_scales`.
        context_file: Safetensors with `context` and `negative_context`, see `request_from_context`.
        denoiser: A model folder in the place of a published pipeline's own, such as a quantized one.
        image: A picture that becomes the first frame of every video, of a pipeline that follows one. Stable Video
            Diffusion follows nothing else, and is given no prompts.
        names: How several videos are called, see `output_paths`.
        frames, height, width: Of the latents (not of the video); the folder's by default, or its family's published
            ones.
        video: (frames, height, width) of the video instead, in pixels, of a published pipeline with its VAE.
        fps: Frames a second; by default the folder's, or its family's published ones. Stable Video Diffusion is told.
        motion_bucket, noise_augmentation: What it is told too, see `models.image_alone.Motion`.
        scale: Enlarge the video by this whole factor; by default small videos to about 288 pixels.
        dtype: Floating type of the weights, a text encoder's too; the file's by default.
        execution: Of quantized layers: "integer", "simulate", or None for the best on this device.
        mesh: Devices to use, axis name to size; by default the first one. A batch that the data and fsdp axes
            do not divide is computed whole by each.
        batch: Videos computed at once, at most.
        step_loop: Run the steps one by one from Python and report each, instead of one compiled scan.
        previews: Write a picture of every video after every so many steps, see `Previews`. The steps are then run one
            by one, and a VAE is read before them and stays beside the model.
        memory_limit: Bytes of one device that are not to be exceeded, by the compiler's account: `batch`, where texts
            are encoded and how the VAE decodes are chosen for it, see `plan_memory`.
        one_batch: Compute both branches of the guidance as one batch, see `qvdjax.diffusion.guided`.
        float_attention: How many first and last steps leave attention in full precision, of a model whose attention is
            quantized; no further weights are read.
        progress: Called with (stage, done, total).

    Returns:
        `files` (paths as text), `videos` (the JSON beside each), and what all share: `steps`,
        `seconds_per_step` (of a batch), `compile_seconds`, `device`, `peak_memory_bytes`, `peak_memory_of`, `memory`
        (of text encoder, denoiser and VAE each `weight_bytes` and `peak_bytes`, what its program needs of one device by
        the compiler's account, one component after the other), `quantization` and more; where prompts were encoded by a
        text encoder also `text_encoder`, and `cut`, how many tokens of which text were too many.

    Raises:
        UserError: A missing or corrupt folder, an unknown word, sizes that the model cannot take, a sampler that
            its tables are not made for, an output that cannot be written, latents that are not finite.
    """
    folder, output = Path(folder), Path(output)
    settings = Settings(
        steps, guidance_scale, shift, solver, sigma_grid, frames, height, width, negative_prompt, dynamic_guidance,
        guidance_until, first_frame_guidance,
    )  # fmt: skip
    report = progress or (lambda stage, done, total: None)
    opened = open_sampled(
        folder, output, denoiser, encodes=context_file is None, execution=execution, shows=previews is not None
    )
    folder, skeleton, encoder = opened.folder, opened.skeleton, opened.encoder
    if encoder is not None and negative_prompt is None:
        usual = sampling_defaults(folder, solver_named=solver is not None).negative_prompt
        settings = dataclasses.replace(settings, negative_prompt=usual)
    if previews is not None and previews < 1:
        raise UserError(f"a preview every {previews} steps", remedy="give a whole number of at least 1")
    step_loop = step_loop or previews is not None
    padding = None
    if video is not None:
        settings, padding = settings_of_video(settings, opened.whole, skeleton.config, video)
    device_mesh = None if mesh is None else make_mesh(mesh)
    about_texts, plan = {}, None
    motion = {"fps": fps, "motion_bucket": motion_bucket, "noise_augmentation": noise_augmentation}
    encodes = None if context_file is not None else opened.whole
    pictures, picture = find_picture(encodes, skeleton.config, image, motion)
    if encoder is None and pictures is None:
        request = _request(folder, skeleton, prompts, seeds, context_file, settings, padding)
    else:
        check_prompts(folder, skeleton, pictures, prompts, seeds, settings)
        texts = stand_ins(folder, encoder, pictures, image, prompts, settings, skeleton.config)
        request = request_from_embeddings(folder, texts, skeleton.config, seeds, settings, padding)
    paths = output_paths(output, request, names)
    how = {"doubled_batch": one_batch, "float_attention": float_attention}
    if memory_limit is not None:
        if mesh is not None:
            raise UserError("a limit of memory is planned for one device", remedy="leave out --mesh or --memory-limit")
        if previews is not None:
            raise UserError(
                "a limit of memory is planned for one component after the other, and previews decode while sampling",
                remedy="leave out --previews or --memory-limit",
            )
        report("planning", 0, 1)
        plan = _planned(
            memory_limit, opened, request, how, step_loop=step_loop, batch=batch, texts=1 + len(prompts or ()),
            pictures=pictures, dtype=dtype and jax.numpy.dtype(dtype),
        )  # fmt: skip
        report("planning", 1, 1)
        batch = plan.batch
    tiling = None if plan is None else plan.tiling
    if encoder is not None:
        texts = _encoded(encoder, prompts, settings, plan, dtype=dtype, mesh=device_mesh, progress=progress)
        about_texts = {"text_encoder": texts.encoder, "cut": texts.cut}
    if pictures is not None:
        shown = pictures.encode(picture, request.latents_shape[:3], dtype=dtype, tiling=tiling, progress=progress)
        texts = EncodedImage(folder, image.stem, shown) if encoder is None else beside_picture(texts, shown)
        about_texts |= {"image": str(image)}
        about_texts |= {"motion": dataclasses.asdict(pictures.motion)} if isinstance(pictures, ImageAlone) else {}
    if encoder is not None or pictures is not None:
        request = request_from_embeddings(folder, texts, skeleton.config, seeds, settings, padding)
    check_timesteps(skeleton, request.solver.schedule(request.steps).timesteps)  # before a weight is read

    model = models.load(folder, dtype=dtype, mesh=device_mesh, execution=execution, progress=progress)
    vae = models.load_vae(opened.vae, progress=progress) if previews is not None and opened.vae is not None else None
    previewed = None if previews is None else _previews(previews, opened, request, vae, paths, scale)
    with contextlib.nullcontext() if device_mesh is None else jax.set_mesh(device_mesh):
        latents, timing, peak = sample_all(
            model, request, how=_arguments(model, how), mesh=device_mesh, batch=min(batch, len(paths)),
            step_loop=step_loop, progress=report, previews=previewed,
        )  # fmt: skip
    latents = latents[:, request.padding :]  # b f h w c, without frames that fill a patch
    if not np.isfinite(latents).all():
        raise UserError(
            f"{folder} sampled latents that are not finite",
            remedy="try a lower guidance scale or float32 weights",
        )
    weights = weight_bytes(model)
    held = peak if previewed is None else previewed.held_bytes(peak, weights)
    shared = {
        "model": str(folder),
        **settings_record(request),
        "loop": "steps" if step_loop else "scan",
        "previews": previews,
        "one_batch": one_batch,
        "float_attention": list(float_attention),
        **timing,
        **device_record(device_mesh),
        **memory_record(device_mesh),
        "memory": {
            **({"text_encoder": _memory_of(about_texts["text_encoder"])} if encoder is not None else {}),
            DENOISER: {"weight_bytes": weights, "peak_bytes": held},
        },
        "memory_plan": None if plan is None else plan.report(),
        "quantization": quantization_record(model),
        **about_texts,
    }
    del model  # a VAE may need its memory
    videos = []
    if jax.process_index() == 0:  # all hosts hold all latents; one of them writes
        decoder = None if request.pipeline is None else of_pipeline(request.pipeline)
        decodes = opened.vae is not None and output.suffix == VIDEO
        if decodes:
            vae = models.load_vae(opened.vae, progress=progress) if vae is None else vae
            usual = sampling_defaults(folder, solver_named=True).fps
            decoder = of_vae(vae, opened.vae, latents.shape[1:], usual, tiling=tiling)
            shared |= {**decoder.about, "memory": {**shared["memory"], VAE: decoder.memory}}
        for row, path in enumerate(paths):
            videos.append(write_video(path, request, row, latents[row], shared, decoder, fps=fps, scale=scale))
            if decodes:
                report("decoding", row + 1, len(paths))
    return {"files": [video["file"] for video in videos], **shared, "videos": videos}


def _planned(
    limit: int, opened: Opened, request: Request, how: Mapping[str, Any], *, step_loop: bool, batch: int, texts: int,
    pictures: Pictures | None, dtype: Any,
) -> MemoryPlan:  # fmt: skip
    """See `plan_memory`, which is told what `opened` and `request` say."""
    stored = used_tensors(CheckpointFolder.open(opened.folder))
    shapes = loaded_shapes(abstract_model(stored, opened.execution), stored, dtype=dtype)
    frames, *sides = request.latents_shape
    return plan_memory(
        limit, model=shapes, inputs=lambda count: inputs_of(request, np.arange(count), None),
        sampling={**request.sampling, **_arguments(shapes, how)}, step_loop=step_loop,
        batch=min(batch, len(request.seeds)), latents=(frames - request.padding, *sides), encoder=opened.encoder,
        texts=texts, vae=opened.vae, pictures=pictures, dtype=dtype,
    )  # fmt: skip


def _arguments(model, how: Mapping[str, Any]) -> dict[str, Any]:
    """What the sampler is told of `how`, which needs the model that is sampled."""
    return {"doubled_batch": how["doubled_batch"], "precise": precise_of(model, how["float_attention"])}


def _encoded(
    encoder: PromptEncoder, prompts: Sequence[str], settings: Settings, plan: MemoryPlan | None, *, dtype: str | None,
    mesh: Mesh | None, progress: Progress | None,
) -> EncodedPrompts:  # fmt: skip
    """The prompts by the pipeline's text encoder, where and so many at once as is planned."""
    on_host = plan is not None and plan.texts == HOST
    where = make_mesh({"data": 1}, jax.devices("cpu")[:1]) if on_host else mesh
    at_once = AT_ONCE if plan is None else plan.texts_at_once
    with contextlib.nullcontext() if where is None else jax.set_mesh(where):
        return encoder.encode(
            prompts, settings.negative_prompt, dtype=dtype, mesh=where, batch=at_once, progress=progress
        )


def _previews(every: int, opened: Opened, request: Request, vae, paths: Sequence[Path], scale: int | None) -> Previews:
    """What shows the videos on the way, by the pipeline's VAE where it has one."""
    if vae is None:
        decoder = of_pipeline(request.pipeline)
    else:
        decoder = of_vae(vae, opened.vae, (1, *request.latents_shape[1:]), fps=1.0)
    return Previews(every, decoder, paths, request.steps, scale)


def _memory_of(record: Mapping) -> dict[str, int | None]:
    return {name: record[name] for name in ("weight_bytes", "peak_bytes")}


def _request(folder, skeleton, prompts, seeds, context_file, settings: Settings, padding: int | None) -> Request:
    if not seeds:
        raise UserError("no seed given", remedy="give one seed per video")
    if (folder / FILE).exists():
        if context_file is not None:
            raise UserError(f"{folder} encodes prompts itself", remedy="give prompts instead of a context file")
        return request_from_pipeline(folder, prompts, seeds, settings)
    if context_file is None:
        raise UserError(
            f"{folder} has no {FILE}, so it cannot encode prompts",
            remedy="name the folder of its whole pipeline, or give a context file: safetensors with `context` and"
            " `negative_context` (tokens, dim), as `qvdjax encode-prompts` makes it",
        )
    return request_from_context(folder, Path(context_file), skeleton.config, prompts, seeds, settings, padding)
