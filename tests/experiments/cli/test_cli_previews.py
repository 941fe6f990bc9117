"""Pictures of what is being sampled: which, of what, and what is refused."""

import numpy as np
import pytest
import small_models
from PIL import Image
from published_folders import WAN_VAE, published_pipeline

import models
from experiments.sampling import sample_folder
from qvdjax.diffusion import UniPCFlow, initial_noise, sample
from qvdjax.errors import UserError

WORDS = ("a", "red", "blue", "disc")
PIPELINE = small_models.pipeline(WORDS, 8, tokens=6, width=6)
SIZES = {"frames": 2, "height": 4, "width": 6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder with a pipeline, which samples three frames of 8 x 12 in three steps."""
    return small_models.sampled_folder(tmp_path_factory.mktemp("models") / "tiny", PIPELINE, num_layers=1)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan", WAN_VAE)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_they_are_the_middle_frames_of_what_predictions_lead_to(folder, tmp_path):
    prompts, seeds = ["a red disc", "a blue disc"], [4, 7]
    report = sample_folder(
        folder, tmp_path / "x.mp4", prompts=prompts, seeds=seeds, previews=1, steps=4, scale=2, batch=3
    )
    assert (report["previews"], report["loop"]) == (1, "steps")
    shown = {}
    rows = [(prompt, seed) for prompt in prompts for seed in seeds]
    sample(
        models.load(folder), PIPELINE.encode([prompt for prompt, _ in rows]), PIPELINE.encode([""] * 4),
        noise=initial_noise([seed for _, seed in rows], PIPELINE.latents_shape), solver=UniPCFlow(3.0), steps=4,
        guidance_scale=4.0, on_step=lambda step, latents, clean: shown.setdefault(step, PIPELINE.decode(clean)),
    )  # fmt: skip
    names = {f"x-{prompt.replace(' ', '-')}-{seed}": row for row, (prompt, seed) in enumerate(rows)}
    assert {path.name for path in tmp_path.glob("*.png")} == {
        f"{name}-step-{step}.png" for name in names for step in (1, 2, 3)
    }
    for name, row in names.items():
        for step in (1, 2, 3):
            expected = (255 * shown[step][row, 1]).repeat(2, axis=0).repeat(2, axis=1)
            # Rounding to whole levels, and a last bit of it in another batch.
            assert np.abs(pixels(tmp_path / f"{name}-step-{step}.png") - expected).max() <= 1


def test_a_vae_decodes_single_frames_and_is_counted(qvdjax, published, tmp_path):
    common = ("sample", published, "-p", "a red cat", "--steps", "12", "--json",
              *(text for name, size in SIZES.items() for text in (f"--{name}", size)))  # fmt: skip
    plain = qvdjax(*common, "-o", tmp_path / "plain.mp4")
    shown = qvdjax(*common, "-o", tmp_path / "shown.mp4", "--previews", "5", "--step-loop")
    assert (plain.code, shown.code) == (0, 0), shown.err
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["shown-step-05.png", "shown-step-10.png"]
    for picture in tmp_path.glob("*.png"):
        assert pixels(picture).shape == (8 * 36, 12 * 36, 3)  # enlarged as the video is
        assert pixels(picture).std() > 1
    vae = shown.report["memory"]["vae"]["weight_bytes"]
    step_loop = qvdjax(*common, "-o", tmp_path / "loop.mp4", "--step-loop").report["memory"]["denoiser"]
    assert shown.report["memory"]["denoiser"]["peak_bytes"] >= step_loop["peak_bytes"] + vae
    only = qvdjax(*common, "-o", tmp_path / "latents.safetensors", "--previews", "6")
    assert only.code == 0, only.err
    assert (tmp_path / "latents-step-06.png").exists()
    assert "vae" not in only.report["memory"]  # nothing was decoded in the end


def test_what_cannot_be_shown_is_refused(folder, published, tmp_path):
    with pytest.raises(UserError, match="a preview every 0 steps"):
        sample_folder(folder, tmp_path / "x.mp4", previews=0)
    with pytest.raises(UserError, match="previews decode while sampling"):
        sample_folder(folder, tmp_path / "x.mp4", prompts=["a disc"], previews=1, memory_limit=2**30)
    with pytest.raises(UserError, match="decodes latents to pictures"):
        sample_folder(published / "transformer", tmp_path / "x.safetensors", previews=1)
    assert not list(tmp_path.iterdir())
