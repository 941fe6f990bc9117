"""How a published model is sampled where no `pipeline.json` says it.

diffusers keeps it in `scheduler/scheduler_config.json`, in a folder beside the model's own (`transformer`). Its
number of steps, guidance scale, size and frame rate are not in any file: they are those of the published scripts.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from models.families import family_of
from qvdjax.checkpoint.folder import CONFIG, read_json
from qvdjax.diffusion import DDIM, DPMSolverSDE, EulerEDM, FlowMatchEuler, Solver, UniPCFlow
from qvdjax.errors import UserError

SCHEDULER = "scheduler_config.json"


@dataclasses.dataclass(frozen=True)
class SamplingDefaults:
    """What holds where nothing else is asked for: see `qvdjax.diffusion.sample`.

    Attributes:
        fps: Frames a second.
        latents: (frames, height, width); None for a model whose image says it.
        padding: So many first frames of these are sampled to fill a patch, and belong to no video.
        negative_prompt: What guidance leads away from.
    """

    solver: Solver
    steps: int
    guidance_scale: float
    fps: float
    latents: tuple[int, int, int] | None
    first_frame_guidance: float | None = None
    padding: int = 0
    negative_prompt: str = ""


# Wan-Video/Wan2.1:wan/configs/shared_config.py: oversaturated, overexposed, static, without detail, subtitles, ...
_WAN_NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_WAN_SHAKING = "镜头晃动，"  # wan/configs/wan_i2v_14B.py, before it: a shaking camera

PUBLISHED = {
    # Wan-Video/Wan2.1:generate.py, text to video.
    "wan": SamplingDefaults(UniPCFlow(5.0), 50, 5.0, 16, (21, 60, 104), negative_prompt=_WAN_NEGATIVE),
    # CogVideoX-2B; THUDM/CogVideo:inference/cli_demo.py, diffusers:pipelines/cogvideo/pipeline_cogvideox.py.
    "cogvideox": SamplingDefaults(DDIM(), 50, 6.0, 8, (13, 60, 90)),
    # Tencent-Hunyuan/HunyuanVideo:hyvideo/config.py; the guidance is embedded, so that there is one pass.
    "hunyuanvideo": SamplingDefaults(FlowMatchEuler(7.0), 50, 6.0, 24, (33, 90, 160)),
    # guoyww/AnimateDiff:configs/inference and configs/prompts.
    "animatediff": SamplingDefaults(
        DDIM(
            beta_schedule="linear", snr_shift_scale=1.0, rescale_betas_zero_snr=False, timestep_spacing="leading",
            steps_offset=1, prediction_type="epsilon",
        ), 25, 7.5, 8, (16, 64, 64),
    ),
    # modelscope/modelscope:modelscope/models/multi_modal/video_synthesis/{text_to_video_synthesis_model,diffusion}.py.
    "modelscope": SamplingDefaults(
        DDIM(
            snr_shift_scale=1.0, rescale_betas_zero_snr=False, set_alpha_to_one=False, timestep_spacing="leading",
            steps_offset=1, prediction_type="epsilon",
        ), 50, 9.0, 8, (16, 32, 32),
    ),
    # diffusers:pipelines/stable_video_diffusion/pipeline_stable_video_diffusion.py.
    "stable-video-diffusion": SamplingDefaults(EulerEDM(), 25, 3.0, 7, None, first_frame_guidance=1.0),
}  # fmt: skip

# diffusers' class -> (what it is here, our field: (its field, its default), what must hold: field: only value).
# Fields that are in neither column do not change what is sampled.
_VARIANCE_PRESERVING = {
    "beta_start": ("beta_start", 0.00085),
    "beta_end": ("beta_end", 0.012),
    "beta_schedule": ("beta_schedule", "scaled_linear"),
    "snr_shift_scale": ("snr_shift_scale", 3.0),
    "rescale_betas_zero_snr": ("rescale_betas_zero_snr", False),
    "set_alpha_to_one": ("set_alpha_to_one", True),
    "timestep_spacing": ("timestep_spacing", "leading"),
    "steps_offset": ("steps_offset", 0),
    "prediction_type": ("prediction_type", "epsilon"),
}
# diffusers' general DDIM, which AnimateDiff's folders name, has other defaults and no shift.
_GENERAL_DDIM = {
    **_VARIANCE_PRESERVING,
    "beta_start": ("beta_start", 0.0001),
    "beta_end": ("beta_end", 0.02),
    "beta_schedule": ("beta_schedule", "linear"),
    "snr_shift_scale": ("snr_shift_scale", 1.0),
}
_TRAINED = {"num_train_timesteps": 1000}
_ONE_GRID = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
_FLOW = {**_TRAINED, **_ONE_GRID, "use_dynamic_shifting": False, "shift_terminal": None}
KNOWN = {
    "UniPCMultistepScheduler": (
        UniPCFlow,
        {"shift": ("flow_shift", 1.0), "order": ("solver_order", 2)},
        {
            **_FLOW, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "predict_x0": True,
            "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [], "final_sigmas_type": "zero",
            "thresholding": False,
        },
    ),
    "FlowMatchEulerDiscreteScheduler": (
        FlowMatchEuler,
        {"shift": ("shift", 1.0)},
        {**_FLOW, "invert_sigmas": False, "stochastic_sampling": False},
    ),
    "DDIMScheduler": (
        DDIM, _GENERAL_DDIM, {**_TRAINED, "trained_betas": None, "clip_sample": False, "thresholding": False},
    ),
    "CogVideoXDDIMScheduler": (DDIM, _VARIANCE_PRESERVING, {**_TRAINED, "trained_betas": None}),
    # As Stable Video Diffusion has it. "leading" is how the first noise level's factor, sqrt(sigma_max^2 + 1), is said.
    "EulerDiscreteScheduler": (
        EulerEDM,
        {"sigma_min": ("sigma_min", None), "sigma_max": ("sigma_max", None)},
        {
            **_TRAINED, **_ONE_GRID, "use_karras_sigmas": True, "timestep_type": "continuous",
            "prediction_type": "v_prediction", "timestep_spacing": "leading", "final_sigmas_type": "zero",
        },
    ),
    "CogVideoXDPMScheduler": (DPMSolverSDE, _VARIANCE_PRESERVING, {**_TRAINED, "trained_betas": None}),
}  # fmt: skip
# Where a field that must hold is left out, diffusers' default holds, and for these it is another value.
_OTHERWISE = {
    "use_flow_sigmas": False, "prediction_type": "epsilon", "clip_sample": True, "timestep_type": "discrete",
    "timestep_spacing": "linspace", "use_karras_sigmas": False,
}  # fmt: skip


def scheduler_file(folder: str | os.PathLike) -> Path | None:
    """The `scheduler_config.json` in a model folder, or in `scheduler` beside it; None where there is none."""
    folder = Path(folder).resolve()
    places = (folder / SCHEDULER, folder.parent / "scheduler" / SCHEDULER)
    return next((place for place in places if place.is_file()), None)


def read_scheduler(path: Path) -> Solver:
    """The solver that a `scheduler_config.json` of diffusers describes.

    UniPC's grid of noise levels, which the file does not name, stays ours ("original").

    Raises:
        UserError: A corrupt file, a class that is not here, a setting that no solver here has.
    """
    config = read_json(path)
    name = config.get("_class_name")
    if not _is_known(config):
        raise UserError(
            f"{path} asks for {name!r}, which is no solver here",
            remedy=f"choose one with --solver, or one of {', '.join(KNOWN)} in the file",
        )
    solver, fields, required = KNOWN[name]
    wrong = [
        f"{field} {config.get(field, _OTHERWISE.get(field, only))!r}"
        for field, only in required.items()
        if config.get(field, _OTHERWISE.get(field, only)) != only
    ]
    if wrong:
        raise UserError(
            f"{path} has settings that {name} does not have here",
            remedy="remove the file to sample as the model's published script does",
            items=wrong,
        )
    options = {ours: config.get(theirs, default) for ours, (theirs, default) in fields.items()}
    for ours, (theirs, default) in fields.items():
        if isinstance(default, float) and not _is_number(options[ours]):
            raise UserError(f"{path}: {theirs!r} is {options[ours]!r}", remedy="it must be a finite number")
    return solver(**options)


def own_solver(folder: str | os.PathLike) -> Solver | None:
    """The solver that a folder's scheduler asks for; None where it has none, or one of a class that is not here.

    Raises:
        UserError: See `read_scheduler`.
    """
    path = scheduler_file(folder)
    return None if path is None or not _is_known(read_json(path)) else read_scheduler(path)


def sampling_defaults(folder: str | os.PathLike, *, solver_named: bool = False) -> SamplingDefaults:
    """How the model of a folder without `pipeline.json` is sampled: its scheduler's settings, or its family's.

    Args:
        folder: A model folder.
        solver_named: Another solver was asked for, so a scheduler of an unknown class does no harm: the
            family's published settings stand in.

    Raises:
        UserError: See `read_scheduler`; an unknown architecture.
    """
    config = read_json(Path(folder) / CONFIG)
    published = PUBLISHED[family_of(config).name]
    if config.get("use_rotary_positional_embeddings") and isinstance(published.solver, DDIM):
        # The 5B models, which differ from the 2B by these embeddings, were trained without the shift.
        solver = dataclasses.replace(published.solver, snr_shift_scale=1.0)
        published = dataclasses.replace(published, solver=solver)
    if config.get("patch_size_t") is not None:
        # Version 1.5, 81 frames of 768 x 1360. Its patches are of two frames, so that one is put before the video's 21.
        published = dataclasses.replace(published, latents=(22, 96, 170), padding=1, fps=16)
    if config.get("image_dim") is not None:
        # Wan-Video/Wan2.1:generate.py, image to video
        negative = _WAN_SHAKING + published.negative_prompt
        published = dataclasses.replace(published, steps=40, negative_prompt=negative)
    path = scheduler_file(folder)
    if path is None or (solver_named and not _is_known(read_json(path))):
        return published
    return dataclasses.replace(published, solver=read_scheduler(path))


def _is_known(config: dict) -> bool:
    name = config.get("_class_name")
    return isinstance(name, str) and name in KNOWN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
