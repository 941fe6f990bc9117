"""compare: several videos in one, and what is refused."""

import numpy as np
import pytest

from experiments.cli.main import main
from experiments.side_by_side import compare_videos
from qvdjax.errors import UserError
from qvdjax.video import read_mp4, write_mp4


@pytest.fixture
def videos(tmp_path):
    paths = [tmp_path / f"{name}.mp4" for name in ("full", "w4a4", "w8a8")]
    for level, path in zip((60, 120, 180), paths, strict=True):
        write_mp4(path, np.full((3, 64, 96, 3), level, np.uint8), fps=12)
    return paths


def test_each_stands_below_its_label(videos, tmp_path):
    report = compare_videos(videos, tmp_path / "out.mp4", labels=["reference", "4 bits", "8 bits"], columns=2)
    clip = read_mp4(tmp_path / "out.mp4")
    assert clip.fps == report["fps"] == 12
    assert clip.frames.shape == (3, report["height"] + report["height"] % 2, report["width"], 3)
    strip = report["height"] // 2 - 64 - 2  # above each of the two rows of panels
    middles = ((strip + 32, 48), (strip + 32, 148), (2 * strip + 64 + 4 + 32, 48))
    assert [round(clip.frames[0, y, x].mean() / 20) * 20 for y, x in middles] == [60, 120, 180]
    assert clip.frames[0, : strip - 4, :96].max() > 150  # something is written there


def test_names_are_the_labels_without_any(videos, tmp_path, capsys):
    command = ["compare", *map(str, videos[:2]), "-o", str(tmp_path / "out.mp4")]
    assert main(command) == 0
    assert "full, w4a4" in capsys.readouterr().out
    assert main([*command, "--label", "a", "--label", "b"]) == 0
    assert ": 3 frames of" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    ({"videos": slice(1)}, "one video alone"),
    ({"labels": ["a"]}, "3 videos with 1 labels"),
    ({"columns": 0}, "0 videos in a row"),
    ({"output": "out.avi"}, "is not .mp4"),
    ({"output": "nowhere/out.mp4"}, "does not exist"),
])  # fmt: skip
def test_what_cannot_be_compared_is_said(videos, tmp_path, options, message):
    options = {"videos": slice(None), "output": "out.mp4", **options}
    with pytest.raises(UserError, match=message):
        compare_videos(videos[options.pop("videos")], tmp_path / options.pop("output"), **options)


def test_other_shapes_are_said_with_their_names(videos, tmp_path):
    write_mp4(videos[1], np.zeros((2, 64, 96, 3), np.uint8), fps=12)
    with pytest.raises(UserError, match="different shapes") as error:
        compare_videos(videos, tmp_path / "out.mp4")
    assert f"{videos[1]} (2 frames of 64 x 96)" in error.value.items
