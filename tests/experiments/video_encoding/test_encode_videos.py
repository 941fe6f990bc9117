"""encode-videos: what is written, going on after an interruption, several processes, bad clips."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from published_folders import WAN_VAE, published_pipeline

import models
from experiments.cli import values
from experiments.cli.main import main
from experiments.training.latents import DataFolder
from experiments.video_encoding import encode_videos, job
from experiments.video_encoding.clips import read_frames
from experiments.video_encoding.work import Work
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder
from qvdjax.errors import UserError
from qvdjax.video import write_mp4

VIDEO, LATENTS = (5, 8, 12), (3, 4, 6, 5)
CAPTIONS = {"a.mp4": "a red cat", "b.mp4": "a disc", "deep/c.mp4": "a red cat", "d.mp4": "cat " * 600}
ROOT = Path(models.__file__).parents[1]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan", WAN_VAE)


@pytest.fixture
def clips(tmp_path):
    random = np.random.default_rng(0)
    (tmp_path / "clips" / "deep").mkdir(parents=True)
    for name in CAPTIONS:
        frames = random.integers(0, 255, (6, 4, 6, 3), np.uint8).repeat(4, axis=1).repeat(4, axis=2)
        write_mp4(tmp_path / "clips" / name, frames, fps=16)
    (tmp_path / "clips" / "captions.json").write_text(json.dumps(CAPTIONS))
    return tmp_path / "clips"


def examples(folder):
    """prompt and number among its equals -> example."""
    data, prompts = DataFolder(folder), json.loads((folder / "prompts.json").read_text())
    assert len(data) == len(prompts)
    return [(prompt, data[row]) for row, prompt in enumerate(prompts)]


def test_latents_and_texts_are_those_of_the_pipeline(pipeline, clips, tmp_path):
    report = encode_videos(clips, pipeline, tmp_path / "out", video=VIDEO)
    expected = {
        "written": True, "clips": 4, "encoded": 4, "failed": [], "left": 0, "video": [*VIDEO],
        "latents": [3, 4, 6], "fps": 16, "cut": {("cat " * 600).strip(): 89},
    }  # fmt: skip
    assert {name: report[name] for name in expected} == expected
    assert sorted(os.listdir(tmp_path)) == ["clips", "out"]  # OUT.work is gone
    vae = models.load_vae(pipeline / "vae")
    texts = PromptEncoder.open(PipelineFolder.open(pipeline)).encode(["a red cat", "a disc"]).tensors["context"]
    found = examples(tmp_path / "out")
    by_name = dict(zip(sorted(CAPTIONS), found, strict=True))
    for name, (prompt, example) in by_name.items():
        assert prompt == CAPTIONS[name].strip()
        pixels = read_frames(clips / name, VIDEO, 16).astype(np.float32) / 127.5 - 1
        latents = vae.normalize(vae.encode(jnp.asarray(pixels)[None]).mode())[0]
        assert example["latents"].shape == LATENTS
        # One compiled program against many, in float32, on latents of size 10.
        np.testing.assert_allclose(example["latents"], latents, atol=1e-4)
    for name, text in (("a.mp4", texts[0]), ("b.mp4", texts[1]), ("deep/c.mp4", texts[0])):
        np.testing.assert_allclose(by_name[name][1]["context"], text, atol=1e-5)


def test_drawn_latents_follow_from_the_clips_name(pipeline, clips, tmp_path):
    mean = tmp_path / "mean"
    encode_videos(clips, pipeline, mean, video=VIDEO)
    for name in ("one", "two"):
        encode_videos(clips, pipeline, tmp_path / name, video=VIDEO, draw=True)
    for (_, one), (_, two), (_, other) in zip(*(examples(tmp_path / n) for n in ("one", "two", "mean")), strict=True):
        np.testing.assert_array_equal(one["latents"], two["latents"])
        assert np.abs(one["latents"] - other["latents"]).max() > 0.1


def test_an_interrupted_run_goes_on(pipeline, clips, tmp_path, monkeypatch):
    read, seen = job.read_frames, []

    def interrupted(path, *arguments):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path.name)
        return read(path, *arguments)

    monkeypatch.setattr(job, "read_frames", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_videos(clips, pipeline, tmp_path / "out", video=VIDEO)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="begun with other settings .*video.*; repeat them, or delete it"):
        encode_videos(clips, pipeline, tmp_path / "out", video=(3, 8, 12))
    # A clip that was changed since is encoded again, and captions are not.
    os.utime(clips / seen[0], ns=(1, 1))
    monkeypatch.setattr(job, "read_frames", lambda path, *rest: (seen.append(path.name), read(path, *rest))[1])
    monkeypatch.setattr(PromptEncoder, "encode_each", None)
    assert encode_videos(clips, pipeline, tmp_path / "out", video=VIDEO)["written"]
    first = seen[:2]
    assert sorted(seen[2:]) == sorted([first[0], *({"a.mp4", "b.mp4", "c.mp4", "d.mp4"} - set(first))])
    assert len(examples(tmp_path / "out")) == 4


def test_bad_clips_are_named_at_the_end(pipeline, clips, tmp_path, capsys):
    (clips / "b.mp4").write_bytes(b"no video")
    write_mp4(clips / "deep" / "c.mp4", np.zeros((4, 8, 12, 3), np.uint8), fps=16)
    shutil.copy(clips / "a.mp4", clips / "e.mp4")
    command = ["encode-videos", clips, pipeline, tmp_path / "out", "--video", "5x8x12"]
    assert main([str(part) for part in command]) == 1
    out, err = capsys.readouterr()
    assert "2 of 5 clips, 5 frames of 8 x 12, latents of 3 x 4 x 6" in out
    assert "89 tokens were cut off the end" in out
    lines = err.splitlines()
    assert len(lines) == 3
    assert "b.mp4 cannot be read as a video" in lines[0]
    assert "c.mp4 is too short: it gives 4 frames at 16 a second, and 5 are asked for" in lines[1]
    assert "e.mp4 has no caption" in lines[2]
    assert [prompt for prompt, _ in examples(tmp_path / "out")] == ["a red cat", ("cat " * 600).strip()]


def test_a_clip_that_another_process_is_at_is_left_to_it(pipeline, clips, tmp_path):
    held, opened = [], Work.open

    def begun(path, settings):
        work = opened(path, settings)
        if not held:
            clip = next(clip for clip in job.find_clips(clips) if clip.name == "b.mp4")
            held.append(work.claim(clip))
            assert held[0].__enter__()
        return work

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Work, "open", begun)
        report = encode_videos(clips, pipeline, tmp_path / "out", video=VIDEO)
        assert (report["written"], report["encoded"], report["left"]) == (False, 3, 1)
        assert not (tmp_path / "out").exists()
        held[0].__exit__(None, None, None)
        assert encode_videos(clips, pipeline, tmp_path / "out", video=VIDEO)["written"]
    assert len(examples(tmp_path / "out")) == 4


@pytest.mark.slow
def test_two_processes_share_the_work(pipeline, clips, tmp_path):
    for number in range(8):
        shutil.copy(clips / "a.mp4", clips / f"more-{number}.mp4")
        (clips / f"more-{number}.txt").write_text("a disc")
    command = [sys.executable, "-m", "experiments.cli.main", "encode-videos", clips, pipeline, tmp_path / "out",
               "--video", "5x8x12", "--json"]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    started = [
        subprocess.Popen([*map(str, command)], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    reports = [json.loads(process.communicate()[0]) for process in started]
    # Who is early enough to find clips that the other is at leaves them to it; one of them writes.
    assert [process.returncode for process in started] == [0, 0], reports
    assert any(report["written"] for report in reports)
    assert len(examples(tmp_path / "out")) == 12


@pytest.mark.parametrize(("options", "message"), [
    ({"video": (4, 8, 12)}, "a video of 4 frames; choose 2n + 1"),
    ({"video": (5, 9, 12)}, "a video of height 9; choose a multiple of 2"),
    ({"video": (5, 10, 12)}, "latent height 5 is no multiple of the patch 2; make height and width multiples of 4"),
    ({"video": (0, 8, 12)}, "a video of 0 frames of 8 x 12"),
    ({"video": (5, 8, 12), "batch": 0}, "a batch of 0 captions"),
])  # fmt: skip
def test_what_cannot_be_done_is_said_before_anything_is_written(pipeline, clips, tmp_path, options, message):
    with pytest.raises(UserError) as error:
        encode_videos(clips, pipeline, tmp_path / "out", **options)
    assert message in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["clips"]


def test_a_folder_that_is_there_and_clips_that_all_fail_are_said(pipeline, clips, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("")
    with pytest.raises(UserError, match="taken exists; choose another name"):
        encode_videos(clips, pipeline, tmp_path / "taken", video=VIDEO)
    with pytest.raises(UserError, match="none of the 4 clips .* could be encoded") as error:
        encode_videos(clips, pipeline, tmp_path / "out", video=(7, 8, 12))
    assert len(error.value.items) == 4


@pytest.mark.parametrize("text", ["81x480", "81x480x", "a", "81x480x832x3", "-1x8x8"])
def test_sizes_are_three_numbers(text):
    assert values.video(" 81 x 480 x 832") == (81, 480, 832)
    with pytest.raises(UserError, match="is no size; write frames, height and width like 81x480x832"):
        values.video(text)
