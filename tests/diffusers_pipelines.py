"""Pipelines that diffusers and transformers make themselves, of small random components, and the frames they sample."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from published_folders import (
    PICTURE_ENCODER,
    PICTURE_MODEL,
    PICTURE_SCHEDULER,
    PICTURE_VAE,
    PIECES,
    PIPELINES,
    POOLED,
    clip_tokenizer,
    llama_tokenizer,
)
from small_models import CLIP_VISION, COGVIDEOX_VARIANTS


def _settings(config: dict) -> dict:
    """What transformers' configuration of an encoder is made of, without what its `config.json` says beside."""
    return {key: value for key, value in config.items() if key not in ("architectures", "model_type")}


# Of each: components by class, how it is called, and how our program is told the same. The sizes are those of the
# published VAEs, 4 (AnimateDiff 1) x 8 x 8 pixels to one of latents, except AnimateDiff's 4 x 4.
_NORM = {"qk_norm": "rms_norm_across_heads"}
_FRAMES = {"num_inference_steps": 3, "guidance_scale": 4.0}
_WIDTHS = [8, 8, 12, 12]
DIFFUSERS = {
    "wan": {
        "pipeline": "WanPipeline",
        "text_encoder": ["UMT5EncoderModel", "UMT5Config"],
        "denoiser": ["transformer", _NORM],
        "vae": {
            "_class_name": "AutoencoderKLWan", "base_dim": 4, "z_dim": 5, "dim_mult": [1, 2, 2, 2],
            "num_res_blocks": 1, "temperal_downsample": [False, True, True],
            "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0], "latents_std": [1.5, 2.0, 0.5, 1.0, 3.0],
        },
        "scheduler": ["UniPCMultistepScheduler", {
            "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0,
            "num_train_timesteps": 1000,
        }],
        "latents": [3, 4, 6, 5], "pixels": [9, 32, 48], "axes": [0, 4, 1, 2, 3], "call": _FRAMES,
    },
    "cogvideox": {
        "pipeline": "CogVideoXPipeline",
        "text_encoder": ["T5EncoderModel", "T5Config"],
        "denoiser": ["transformer", {}],
        "vae": {
            "_class_name": "AutoencoderKLCogVideoX", "block_out_channels": _WIDTHS, "latent_channels": 5,
            "down_block_types": ["CogVideoXDownBlock3D"] * 4, "up_block_types": ["CogVideoXUpBlock3D"] * 4,
            "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 1.15258426,
        },
        "scheduler": ["CogVideoXDDIMScheduler", {
            "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False,
        }],
        "latents": [3, 8, 6, 5], "pixels": [9, 64, 48], "axes": [0, 1, 4, 2, 3],
        "call": {**_FRAMES, "max_sequence_length": 7},
    },
    "animatediff": {
        "pipeline": "AnimateDiffPipeline",
        "text_encoder": ["CLIPTextModel", "CLIPTextConfig"],
        "denoiser": ["unet", {}],
        "vae": {
            "_class_name": "AutoencoderKL", "block_out_channels": [8, 12, 12], "latent_channels": 5,
            "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3,
            "norm_num_groups": 4, "scaling_factor": 0.18215,
        },
        "scheduler": ["DDIMScheduler", {
            "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False,
            "timestep_spacing": "leading", "steps_offset": 1,
        }],
        "latents": [3, 4, 6, 5], "pixels": [3, 16, 24], "axes": [0, 4, 1, 2, 3], "call": _FRAMES,
    },
}  # fmt: skip
# Patches of two frames: a fourth is put before the three of the video.
DIFFUSERS["cogvideox-1.5"] = {
    **DIFFUSERS["cogvideox"], "denoiser": ["transformer", COGVIDEOX_VARIANTS["1.5-5b"]], "latents": [4, 8, 6, 5],
    "video": "9x64x48",
}  # fmt: skip
# Image-to-video: a picture of other proportions than the video. What is drawn from the VAE's Gaussian is our noise; of
# version 1.5 the VAE's factor divides what the model is shown.
DIFFUSERS["cogvideox-i2v"] = {
    **DIFFUSERS["cogvideox"],
    "pipeline": "CogVideoXImageToVideoPipeline",
    "denoiser": ["transformer", COGVIDEOX_VARIANTS["5b-i2v"]],
    "image": [20, 28],
}
DIFFUSERS["cogvideox-1.5-i2v"] = {
    **DIFFUSERS["cogvideox-1.5"],
    "pipeline": "CogVideoXImageToVideoPipeline",
    "denoiser": ["transformer", COGVIDEOX_VARIANTS["1.5-5b-i2v"]],
    "image": [20, 28],
    "vae": {**DIFFUSERS["cogvideox"]["vae"], "invert_scale_latents": True},
}
# CLIP sees it at 8 x 8.
DIFFUSERS["wan-i2v"] = {
    **DIFFUSERS["wan"], "pipeline": "WanImageToVideoPipeline",
    # Of the model's 14 channels 5 are the latents', 4 say which frames are given, and 5 are those.
    "denoiser": ["transformer", {"in_channels": 14, "image_dim": 24, "added_kv_proj_dim": 64, **_NORM}],
    "image_config": _settings(CLIP_VISION),
    "image": [20, 28],
}  # fmt: skip
# A short request to the language model: the small tokenizer cuts the real one into more tokens than are cut off.
DIFFUSERS["hunyuanvideo"] = {
    "pipeline": "HunyuanVideoPipeline",
    "text_encoder": ["LlamaModel", "LlamaConfig"],
    "pooled_config": _settings(POOLED),
    "template": {"template": "a s {} red", "crop_start": 2},
    "denoiser": ["transformer", {}],
    "vae": {
        "_class_name": "AutoencoderKLHunyuanVideo", "block_out_channels": [8, 8, 8, 12], "latent_channels": 5,
        "down_block_types": ["HunyuanVideoDownBlock3D"] * 4, "up_block_types": ["HunyuanVideoUpBlock3D"] * 4,
        "layers_per_block": 1, "norm_num_groups": 4, "scaling_factor": 0.476986,
    },
    "scheduler": ["FlowMatchEulerDiscreteScheduler", {"shift": 7.0}],
    "latents": [3, 4, 6, 5], "pixels": [9, 32, 48], "axes": [0, 4, 1, 2, 3], "call": _FRAMES,
}  # fmt: skip
# A picture and no text. What diffusers puts on the picture is our noise, and the sizes are those it divides by 8.
DIFFUSERS["stable-video-diffusion"] = {
    "pipeline": "StableVideoDiffusionPipeline",
    "denoiser": ["unet", PICTURE_MODEL],
    "image_config": _settings(PICTURE_ENCODER),
    "vae": PICTURE_VAE,
    "scheduler": ["EulerDiscreteScheduler", PICTURE_SCHEDULER],
    "latents": [3, 4, 6, 5], "pixels": [3, 16, 24], "axes": [0, 1, 4, 2, 3], "image": [20, 28],
    "call": {
        "num_inference_steps": 3, "max_guidance_scale": 4.0, "fps": 9, "motion_bucket_id": 60,
        "noise_aug_strength": 0.3,
    },
    "told": ["--guidance-scale", 4.0, "--fps", 9, "--motion-bucket", 60, "--noise-augmentation", 0.3],
}  # fmt: skip
PROMPT, NEGATIVE, SEED = "a red cat", "a disc", 3

# Makes the folders and samples them, with PyTorch. The initial noise is ours.
_REFERENCE = """
import importlib, json, sys
from types import SimpleNamespace
import diffusers, jax, numpy as np, torch, transformers
from qvdjax.diffusion import initial_noise

cases, (prompt, negative, seed) = json.loads(sys.argv[1])
torch.manual_seed(0)
def drawn(shape, **options):
    ours = np.asarray(jax.random.normal(jax.random.key(0), [shape[axis] for axis in (0, 2, 3, 4, 1)]))
    return torch.tensor(ours.transpose(0, 4, 1, 2, 3))

importlib.import_module("diffusers.models.autoencoders.vae").randn_tensor = drawn  # of CogVideoX's pictures alone
wan_i2v = importlib.import_module("diffusers.pipelines.wan.pipeline_wan_i2v")
if not hasattr(wan_i2v, "ftfy"):  # which may not be installed; these prompts have nothing to be mended
    wan_i2v.ftfy = SimpleNamespace(fix_text=str)

def randomised(module):
    for name, tensor in module.named_parameters():
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 1
        spread = 1.5 / fan_in**0.5 if fan_in > 1 else 0.5
        # Most pixels are to lie between black and white.
        tensor.data.copy_(torch.randn(tensor.shape) * (spread / 2 if "decoder.conv_out" in name else spread))
    return module.eval()

def save_and_sample(case, parts, **more):
    pipeline = getattr(diffusers, case["pipeline"])(**parts)
    pipeline.save_pretrained(case["folder"])
    noise = np.asarray(initial_noise([seed], case["latents"])).transpose(case["axes"])
    frames, height, width = case["pixels"]
    made = pipeline(
        num_frames=frames, height=height, width=width, output_type="np", latents=torch.tensor(noise), **case["call"],
        **more,
    ).frames[0]
    np.save(case["frames"], made)

def common_parts(case):
    (name, config), vae = case["denoiser"], dict(case["vae"])
    scheduler, options = case["scheduler"]
    return {
        name: randomised(getattr(diffusers, config.pop("_class_name"))(**config)),
        "vae": randomised(getattr(diffusers, vae.pop("_class_name"))(**vae)),
        "scheduler": getattr(diffusers, scheduler)(**options),
    }

def sample_picture_alone(case):
    from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion as module
    from PIL import Image
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def ours(shape, **options):
        return torch.tensor(np.asarray(initial_noise([0], (*shape[2:], 3))).transpose(0, 3, 1, 2))

    module.randn_tensor = ours
    parts = {
        **common_parts(case),
        "image_encoder": randomised(transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**case["image_config"]))),
        "feature_extractor": CLIPImageProcessorPil(),
    }
    save_and_sample(case, parts, image=Image.open(case["image"]))

for family, case in cases.items():
    if "text_encoder" not in case:
        sample_picture_alone(case)
        continue
    kind, settings = case["text_encoder"]
    text = getattr(transformers, settings)(**case["text_config"])
    if case["merges"] and "template" not in case:
        tokenizer = transformers.CLIPTokenizer.from_pretrained(case["merges"])
    else:
        tokenizer = transformers.T5Tokenizer(vocab=[tuple(piece[:2]) for piece in case["pieces"]], extra_ids=0)
    parts = {
        **common_parts(case), "text_encoder": randomised(getattr(transformers, kind)(text)), "tokenizer": tokenizer,
    }
    more = {} if "template" in case else {"negative_prompt": negative}
    if "template" in case:
        parts["tokenizer"] = transformers.PreTrainedTokenizerFast(
            tokenizer_file=case["tokens"], pad_token="<pad>", padding_side="right")
        parts["text_encoder_2"] = randomised(transformers.CLIPTextModel(
            transformers.CLIPTextConfig(**case["pooled_config"])))
        parts["tokenizer_2"] = transformers.CLIPTokenizer.from_pretrained(case["merges"])
        more["prompt_template"] = case["template"]
    if family == "animatediff":
        parts["motion_adapter"] = None  # its weights are the UNet's
    if "image" in case:
        from PIL import Image

        more["image"] = Image.open(case["image"])
    if "image_config" in case:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        parts["image_encoder"] = randomised(transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**case["image_config"])))
        parts["image_processor"] = CLIPImageProcessorPil(
            size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    save_and_sample(case, parts, prompt=prompt, **more)
"""

# Runs our program where importing PyTorch, diffusers or transformers raises, and keeps the frames before an mp4 rounds
# them.
_OURS = """
import dataclasses, json, sys

class Refused:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers"):
            raise ImportError(f"{name} was to be imported where it must not be needed")

sys.meta_path.insert(0, Refused)
try:
    import torch
except ImportError as error:
    assert "must not be needed" in str(error)
else:
    raise SystemExit("PyTorch was imported")

import numpy as np
from experiments.cli.main import main
from experiments.sampling import output
from models import prompts

write = output.write_mp4
template, runs = json.loads(sys.argv[1])
prompts.RULES["hunyuanvideo"] = dataclasses.replace(
    prompts.RULES["hunyuanvideo"], template=template["template"], crop=template["crop_start"])
for frames, arguments in runs:
    def keep(path, video, **options):
        np.save(frames, video)
        write(path, video, **options)

    output.write_mp4 = keep
    if code := main(arguments):
        raise SystemExit(code)
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""


def sample_with_diffusers(folder: Path) -> None:
    """Write `<family>`, the folder of a pipeline, and `<family>-theirs.npy`, the frames that diffusers samples."""
    cases, words = {}, llama_tokenizer(folder / "llama") / "tokenizer.json"
    for family, case in DIFFUSERS.items():
        _, config, text, _ = PIPELINES.get(family.partition("-")[0], (None, {}, {}, None))
        name, more = case["denoiser"]
        clip = family in ("animatediff", "hunyuanvideo")
        cases[family] = {
            **case,
            "denoiser": [name, {**config, **more}],
            "text_config": _settings(text),
            "merges": str(clip_tokenizer(folder / f"{family}-clip")) if clip else None,
            "tokens": str(words),
            "pieces": PIECES,
            "folder": str(folder / family),
            "frames": str(folder / f"{family}-theirs.npy"),
        }
        if "image" in case:
            cases[family]["image"] = str(folder / "picture.png")
            height, width = case["image"]
            rows, columns = np.mgrid[:height, :width]
            picture = np.stack([rows * 12, columns * 9, (rows + columns) * 5], axis=-1).astype(np.uint8)
            Image.fromarray(picture).save(folder / "picture.png")
    _run(_REFERENCE, [cases, [PROMPT, NEGATIVE, SEED]])


def sample_without_pytorch(folder: Path) -> None:
    """Sample the same with `qvdjax sample`: `<family>.mp4` and `<family>-ours.npy`."""
    runs = []
    for family, case in DIFFUSERS.items():
        frames, height, width, _ = case["latents"]
        arguments = [
            "sample", folder / family, "-o", folder / f"{family}.mp4", "--seeds", SEED,
            "--steps", case["call"]["num_inference_steps"],
            *case.get("told", ["-p", PROMPT, "--guidance-scale", case["call"].get("guidance_scale")]),
        ]  # fmt: skip
        latents = ["--frames", frames, "--height", height, "--width", width]
        arguments += ["--video", case["video"]] if "video" in case else latents
        arguments += [] if case.keys() & {"template", "told"} else ["--negative-prompt", NEGATIVE]
        arguments += ["--sigma-grid", "diffusers"] if family.startswith("wan") else []
        arguments += ["--image", folder / "picture.png"] if "image" in case else []
        runs.append([str(folder / f"{family}-ours.npy"), [str(argument) for argument in arguments]])
    _run(_OURS, [DIFFUSERS["hunyuanvideo"]["template"], runs])


def _run(program: str, cases: dict | list) -> None:
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device, as on a user's machine
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(cases)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
