"""Which folders make a pair, what of the page's fields is refused, and what an answer says."""

import numpy as np
import pytest
from published_folders import WAN_VAE, published_pipeline
from safetensors.numpy import load_file

import models
import qvdjax
from experiments.moving_shapes import captions
from experiments.sampling import sample_folder
from experiments.web.answer import answer, measures
from experiments.web.pair import open_pair
from experiments.web.question import Question, read_question
from models.pipeline import Pipeline, copy_pipeline
from qvdjax.errors import UserError
from qvdjax.metrics import PSNR_CEILING, psnr, relative_error, ssim
from qvdjax.video import read_mp4

RED = "a red disc moving left"
QUESTION = Question(RED, seed=3, steps=2, guidance_scale=2.0)


def test_the_page_begins_with_the_references_settings(shipped):
    pair = open_pair(shipped.wan, shipped.w4a4)
    assert (pair.steps, pair.guidance_scale) == (20, 3.0)
    assert len(set(pair.presets)) == len(pair.presets) > 5
    assert all(captions.Caption.parse(preset) for preset in pair.presets)


def test_what_is_no_pair_is_refused(shipped, tmp_path):
    with pytest.raises(UserError, match="is a wan model and .* a cogvideox model"):
        open_pair(shipped.wan, shipped.cogvideox)
    with pytest.raises(UserError, match="nowhere"):
        open_pair(shipped.wan, tmp_path / "nowhere")
    with pytest.raises(UserError, match="leave out --video"):
        open_pair(shipped.wan, shipped.w4a4, video=(9, 32, 32))
    bare = tmp_path / "bare"
    models.save(models.load(shipped.wan), bare)
    (bare / "pipeline.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"bare has no pipeline\.json"):
        open_pair(shipped.wan, bare)
    copy_pipeline(shipped.wan, bare)
    assert open_pair(shipped.wan, bare)
    text = (bare / "pipeline.json").read_text()
    (bare / "pipeline.json").write_text(text.replace('"shift": 3.0', '"shift": 5.0'))
    with pytest.raises(UserError, match="sampled differently"):
        open_pair(shipped.wan, bare)


def test_fields_become_a_question():
    # gradio hands whole numbers on as int or float.
    assert read_question(f" {RED}\n", 3.0, 2, 2) == QUESTION


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"steps": 0}, "the number of steps is 0; give a whole number of at least 1"),
        ({"steps": 2.5}, "the number of steps is 2.5"),
        ({"steps": None}, "the number of steps is empty"),
        ({"seed": -1}, "the seed is -1"),
        ({"seed": 2**31}, "the seed is 2.14748e"),
        ({"seed": float("inf")}, "the seed is inf"),
        ({"guidance": float("nan")}, "the guidance scale is nan"),
        ({"guidance": None}, "the guidance scale is empty"),
    ],
)
def test_what_cannot_be_asked_is_refused(fields, said):
    with pytest.raises(UserError) as refusal:
        read_question(**{"prompt": RED, "seed": 0, "steps": 2, "guidance": 2.0, **fields})
    assert said in str(refusal.value)


def test_a_model_beside_itself_is_equal(shipped, tmp_path):
    found = answer(open_pair(shipped.wan, shipped.wan), QUESTION, tmp_path)
    # The same program and the same noise: equal to the bit.
    assert (found.psnr, found.ssim, found.relative_error) == (PSNR_CEILING, 1.0, 0.0)
    assert found.reference.weight_bytes == found.candidate.weight_bytes


def test_an_answer_says_what_the_samplers_made(shipped, tmp_path):
    stages = []
    pair = open_pair(shipped.wan, shipped.w4a4)
    found = answer(pair, QUESTION, tmp_path, progress=lambda stage, done, total: stages.append(stage))
    videos, reports = [], []
    for folder in (shipped.wan, shipped.w4a4):
        file = tmp_path / "alone.safetensors"
        asked = {"prompts": [RED], "seeds": [3], "steps": 2, "guidance_scale": 2.0}
        reports.append(sample_folder(folder, file, **asked))
        videos.append(Pipeline.load(folder).decode(load_file(file)["latents"][None])[0])
    assert found.psnr == psnr(videos[1], videos[0]).mean() < 40
    assert found.ssim == ssim(videos[1], videos[0]).mean()
    assert found.relative_error == float(relative_error(videos[1], videos[0]))
    for side, report, video in zip((found.reference, found.candidate), reports, videos, strict=True):
        assert side.weight_bytes == report["memory"]["denoiser"]["weight_bytes"]
        assert side.seconds > 0
        shown = read_mp4(side.video)
        assert (shown.fps, len(shown.frames)) == (8, len(video))
        # Blocks of pixels are one colour: their means are the video's, up to what compression takes, which is a few
        # of 255 levels; other noise would be tens of levels away.
        blocks = shown.frames.reshape(len(video), 32, 9, 32, 9, 3).mean(axis=(2, 4))
        assert np.abs(blocks - 255 * video).mean() < 8
    assert (found.reference.recipe, found.candidate.recipe) == (None, "rtn-w4a4")
    assert found.reference.weight_bytes > 3 * found.candidate.weight_bytes
    assert {stage.split(":")[0] for stage in stages} == {"reference", "candidate"}


def test_measures_are_of_the_candidate_to_the_reference():
    reference = np.full((2, 12, 12, 3), 0.5)
    found = measures({"reference": reference, "candidate": reference + 0.25})
    # 10 log10(1 / 0.25^2), and 0.25^2 / 0.5^2, of which every term and sum is exact in float32.
    assert found["psnr"] == pytest.approx(12.0412, abs=1e-4)
    assert found["relative_error"] == 0.25
    assert found["ssim"] < 1


def test_a_candidate_stands_in_for_a_published_pipelines_model(tmp_path):
    whole = published_pipeline(tmp_path / "whole", "wan", WAN_VAE)
    own = whole / "transformer"
    quantized = tmp_path / "w8a8"
    models.save(qvdjax.quantize(models.load(own), "rtn-w8a8"), quantized)
    pair = open_pair(whole, quantized, video=(3, 8, 12))
    found = answer(pair, Question("a red cat", seed=0, steps=2, guidance_scale=2.0), tmp_path)
    assert (found.reference.recipe, found.candidate.recipe) == (None, "rtn-w8a8")
    assert 0 < found.relative_error < 1
    assert len(read_mp4(found.candidate.video).frames) == 3
    with pytest.raises(UserError, match="4"):  # frames are 2 n + 1
        open_pair(whole, quantized, video=(4, 8, 12))
