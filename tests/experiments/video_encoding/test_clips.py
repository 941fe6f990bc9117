"""Folders of clips: captions, frames of one size and rate, and what is said about bad ones."""

import json

import numpy as np
import pytest

from experiments.video_encoding.clips import find_clips, read_frames
from qvdjax.errors import UserError
from qvdjax.video import write_mp4


def greys(*levels, height=32, width=48):
    """Frames of one grey each, which an mp4 keeps within a few levels."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3))


@pytest.fixture
def clip(tmp_path):
    """Twelve frames at 24 a second, each of another grey."""
    write_mp4(tmp_path / "clip.mp4", greys(*range(20, 240, 20), 239), fps=24)
    return tmp_path / "clip.mp4"


def levels(frames):
    return [round(float(frame.mean()) / 20) * 20 for frame in frames]


def test_captions_beside_clips_and_in_one_file(tmp_path):
    (tmp_path / "deep").mkdir()
    for name in ("b.mp4", "deep/a.MOV", "c.webm", "notes.pdf"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbf a red\n  cat \n")
    (tmp_path / "captions.json").write_text(json.dumps({"deep/a.MOV": "a disc"}))
    clips = find_clips(tmp_path)
    assert [clip.name for clip in clips] == ["b.mp4", "c.webm", "deep/a.MOV"]
    assert (clips[0].caption(), clips[2].caption()) == ("a red cat", "a disc")
    with pytest.raises(UserError, match=r"c.webm has no caption; write c.txt, or an entry of captions.json"):
        clips[1].caption()
    (tmp_path / "c.txt").write_text(" \n")
    with pytest.raises(UserError, match="c.webm is empty; say what it shows"):
        clips[1].caption()
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as UTF-8"):
        clips[1].caption()


@pytest.mark.parametrize(("content", "message"), [
    ("{", "cannot be read as JSON"),
    ('{"a.mp4": 3}', "captions that are no strings: a.mp4"),
    ('{"x.mp4": "a", "y.mp4": "b"}', "names clips that are not there: x.mp4, y.mp4"),
])  # fmt: skip
def test_bad_files_of_captions_are_said(tmp_path, content, message):
    (tmp_path / "a.mp4").write_bytes(b"")
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError) as error:
        find_clips(tmp_path)
    assert message.split(":")[0] in str(error.value)
    assert all(name in str(error.value) for name in message.split(": ")[1:])


def test_no_clips_are_said(tmp_path):
    with pytest.raises(UserError, match="holds no clip; put files there that end in .mp4"):
        find_clips(tmp_path)
    with pytest.raises(UserError, match="is no folder"):
        find_clips(tmp_path / "nowhere")


def test_every_frame_or_those_of_a_rate(clip):
    assert levels(read_frames(clip, (4, 32, 48), None)) == [20, 40, 60, 80]
    assert levels(read_frames(clip, (4, 32, 48), 24)) == [20, 40, 60, 80]
    assert levels(read_frames(clip, (6, 32, 48), 12)) == [20, 60, 100, 140, 180, 220]
    # 24 / 16 frames apart: 0, 1.5, 3, 4.5, 6; halves go to the even one.
    assert levels(read_frames(clip, (5, 32, 48), 16)) == [20, 60, 80, 100, 140]


@pytest.mark.parametrize(("frames", "fps", "message"), [
    (13, None, "is too short: it gives 12 frames, and 13 are asked for"),
    (7, 12, "is too short: it gives 6 frames at 12 a second, and 7 are asked for"),
    (3, 25, "has 24 frames a second, and 25 are asked for; ask for fewer with --fps"),
])  # fmt: skip
def test_clips_of_too_few_frames_are_said(clip, frames, fps, message):
    with pytest.raises(UserError) as error:
        read_frames(clip, (frames, 32, 48), fps)
    assert message in str(error.value)


def test_what_stands_out_is_cut_off_on_both_sides(tmp_path):
    video = np.full((2, 40, 64, 3), 128, np.uint8)
    video[:, :, :12], video[:, :, 52:] = 10, 250
    write_mp4(tmp_path / "wide.mp4", video, fps=8)
    frames = read_frames(tmp_path / "wide.mp4", (2, 20, 20), None)  # half as large, 32 wide; 6 cut off at each side
    assert frames.shape == (2, 20, 20, 3)
    assert np.abs(frames[:, :, 1:-1].astype(float) - 128).max() < 16
    frames = read_frames(tmp_path / "wide.mp4", (2, 80, 128), None)  # all of it, enlarged
    assert frames.shape == (2, 80, 128, 3)
    assert np.abs(frames[:, :, [0, -1]].mean(axis=(0, 1, 3)) - [10, 250]).max() < 8


def test_what_is_no_video_is_said(tmp_path, clip):
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UserError, match=r"text.mp4 cannot be read as a video"):
        read_frames(tmp_path / "text.mp4", (1, 8, 8), None)
    content = clip.read_bytes()
    clip.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"clip.mp4 (cannot be read|is too short)"):
        read_frames(clip, (12, 32, 48), None)
