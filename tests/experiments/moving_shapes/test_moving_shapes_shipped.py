"""The shipped models: small, honest about their quality, and the same in diffusers."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import models
from experiments.moving_shapes.captions import prompts
from experiments.moving_shapes.full_precision import CHECKPOINTS, evaluate_full_precision
from models.pipeline import Pipeline
from qvdjax.diffusion import initial_noise

FAMILIES = ("wan", "cogvideox", "animatediff")
FOLDERS = [CHECKPOINTS / f"{family}{end}" for family in FAMILIES for end in ("", "-outlier")]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_folders_are_small(folder):
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8 * 2**20
    model = models.skeleton(folder)
    assert sum(stack.count or 1 for stack in model.stacks) >= 6  # blocks
    config = model.config.to_dict()
    levels = config.get("block_out_channels")  # of a UNet
    narrowest = min(levels) // config["num_attention_heads"] if levels else config["attention_head_dim"]
    assert narrowest >= 32


def one_step(folder, clips: int = 2):
    """A velocity of real latents, their inputs in our layout."""
    pipeline = Pipeline.load(folder)
    context = pipeline.encode(prompts(clips))
    latents = np.asarray(initial_noise(list(range(clips)), pipeline.latents_shape))
    return latents, np.linspace(20.0, 980.0, clips, dtype=np.float32), context


def relative(a, b) -> float:
    return float(np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(np.asarray(b)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_outlier_variant_is_the_same_function(family):
    folders = [CHECKPOINTS / f"{family}{end}" for end in ("", "-outlier")]
    inputs = [jnp.asarray(array) for array in one_step(folders[0])]
    plain, heavy = (models.load(folder)(*inputs) for folder in folders)
    # Factors of up to 50 cancel; float32 rounding of six blocks is left.
    assert relative(heavy, plain) <= 1e-5


def with_channels_first(model, latents, timestep, context):
    """One of diffusers' models on our inputs, in our layout."""
    import torch

    latents = torch.from_numpy(latents.transpose(0, 4, 1, 2, 3))  # b f h w c -> b c f h w
    output = model.eval()(latents, torch.from_numpy(timestep), torch.from_numpy(context)).sample
    return output.numpy().transpose(0, 2, 3, 4, 1)  # b c f h w -> b f h w c


def wan_of_diffusers(folder, latents, timestep, context):
    """diffusers' Wan."""
    from diffusers import WanTransformer3DModel

    return with_channels_first(WanTransformer3DModel.from_pretrained(folder), latents, timestep, context)


def cogvideox_of_diffusers(folder, latents, timestep, context):
    """diffusers' CogVideoX likewise; its pipeline makes the rotary tables."""
    import torch
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel.from_pretrained(folder).eval()
    frames, height, width = latents.shape[1:4]
    tables = CogVideoXPipeline._prepare_rotary_positional_embeddings(
        SimpleNamespace(transformer=model, vae_scale_factor_spatial=1), height, width, frames, torch.device("cpu")
    )
    latents = torch.from_numpy(latents.transpose(0, 1, 4, 2, 3))  # b f h w c -> b f c h w
    output = model(latents, torch.from_numpy(context), torch.from_numpy(timestep), image_rotary_emb=tables).sample
    return output.numpy().transpose(0, 1, 3, 4, 2)  # b f c h w -> b f h w c


def animatediff_of_diffusers(folder, latents, timestep, context):
    """diffusers' UNet with motion modules, which its pipeline gives the text once a frame."""
    from diffusers import UNetMotionModel

    context = np.repeat(context, latents.shape[1], axis=0)  # b n d -> (b f) n d
    return with_channels_first(UNetMotionModel.from_pretrained(folder), latents, timestep, context)


OF_DIFFUSERS = {"wan": wan_of_diffusers, "cogvideox": cogvideox_of_diffusers, "animatediff": animatediff_of_diffusers}


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_diffusers_loads_and_runs_the_folder(folder):
    import torch

    latents, timestep, context = one_step(folder)
    with torch.no_grad():
        expected = OF_DIFFUSERS[folder.name.removesuffix("-outlier")](folder, latents, timestep, context)
    ours = models.load(folder)(jnp.asarray(latents), jnp.asarray(timestep), jnp.asarray(context))
    # Both in float32: six blocks of rounding, and torch's float32 sinusoids of the timestep.
    assert relative(ours, expected) <= 1e-4


@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("family", FAMILIES)
def test_the_full_precision_model_paints_what_prompts_say(family):
    """What every comparison on the bench rests on; a prompt and a seed each, so that nothing here is drawn anew."""
    scores = evaluate_full_precision(CHECKPOINTS / family, clips=320)
    # CogVideoX is trained less, and its README says so; 320 clips have a deviation of 0.02 there.
    least = {"wan": 0.9, "cogvideox": 0.75, "animatediff": 0.95}[family]
    assert min(scores[name] for name in ("color", "direction")) >= 0.9, scores
    assert scores["shape"] >= least, scores
    assert min(scores["speed"], scores["background"]) >= 0.9, scores
