"""mp4 files and pictures of several videos."""

import av
import numpy as np
import pytest

from qvdjax.errors import UserError
from qvdjax.video import enlarge, read_mp4, side_by_side, to_uint8, write_mp4


def gradient(frames=5, height=32, width=48):
    """A smooth clip that changes from frame to frame, float32 in [0, 1]."""
    t, y, x = np.meshgrid(np.linspace(0, 1, frames), np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return np.stack([x, y, (t + x + y) / 3], axis=-1).astype(np.float32)


def test_written_videos_can_be_read(tmp_path):
    video = gradient()
    write_mp4(tmp_path / "clip.mp4", video, fps=8)
    clip = read_mp4(tmp_path / "clip.mp4")
    assert clip.frames.shape == video.shape
    assert clip.frames.dtype == np.uint8
    assert clip.fps == 8
    # Smooth colours survive crf 12: 8-bit YUV with half the colour resolution, some 40 dB, 2.5 levels.
    assert np.abs(clip.frames - 255.0 * video).mean() < 4
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(("height", "width"), [(15, 17), (16, 17), (15, 16), (1, 1)])
def test_odd_sizes_are_padded_with_their_edge(tmp_path, height, width):
    video = np.zeros((2, height, width, 3), np.uint8)
    video[:, -1, :] = 255
    video[:, :, -1] = 255
    write_mp4(tmp_path / "clip.mp4", video, fps=8, quality=0)
    frames = read_mp4(tmp_path / "clip.mp4").frames
    assert frames.shape == (2, height + height % 2, width + width % 2, 3)
    # The edge is white and so is what was added; luma is nearly lossless at quality 0.
    assert frames[:, -1].min() > 240
    assert frames[:, :, -1].min() > 240


def test_enlarged_clips_keep_hard_edges(tmp_path):
    video = np.zeros((1, 3, 4, 3), np.uint8)
    video[0, 1, 2] = (250, 120, 30)
    large = enlarge(video, 5)
    assert large.shape == (1, 15, 20, 3)
    assert (large[0, 5:10, 10:15] == (250, 120, 30)).all()
    assert large.astype(int).sum() == 25 * 400
    write_mp4(tmp_path / "clip.mp4", video, fps=29.97, scale=6)
    clip = read_mp4(tmp_path / "clip.mp4")
    assert clip.frames.shape == (1, 18, 24, 3)
    assert clip.fps == pytest.approx(29.97, rel=1e-6)  # a fraction of at most 1000ths holds 2997/100


def test_two_writes_make_the_same_bytes_and_replace(tmp_path):
    path = tmp_path / "clip.mp4"
    write_mp4(path, gradient(), fps=8)
    first = path.read_bytes()
    write_mp4(path, gradient(frames=2), fps=8)
    assert path.read_bytes() != first
    write_mp4(path, gradient(), fps=8)
    assert path.read_bytes() == first


def test_to_uint8():
    video = np.array([-0.5, 0.0, 0.5, 1.0, 2.0, 0.25]).reshape(1, 1, 2, 3)
    np.testing.assert_array_equal(to_uint8(video).ravel(), [0, 0, 128, 255, 255, 64])
    assert to_uint8(to_uint8(video)) is not None


@pytest.mark.parametrize(
    ("video", "named"),
    [
        (np.zeros((2, 4, 4)), r"shape \(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 4)), r"shape \(2, 4, 4, 4\)"),
        (np.zeros((0, 4, 4, 3)), r"shape \(0, 4, 4, 3\)"),
        (np.zeros((2, 4, 4, 3), np.int32), "type int32"),
        (np.full((2, 4, 4, 3), np.nan), "NaN"),
    ],
)
def test_arrays_that_are_no_video(tmp_path, video, named):
    with pytest.raises(UserError, match=named):
        write_mp4(tmp_path / "clip.mp4", video, fps=8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"fps": 0}, "rate is 0"), ({"fps": np.inf}, "rate is inf"), ({"fps": 8, "scale": 0}, "scale is 0")],
)
def test_bad_settings(tmp_path, arguments, named):
    with pytest.raises(UserError, match=named):
        write_mp4(tmp_path / "clip.mp4", gradient(), **arguments)


def test_targets_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="missing does not exist"):
        write_mp4(tmp_path / "missing" / "clip.mp4", gradient(), fps=8)
    with pytest.raises(UserError, match="is a folder"):
        write_mp4(tmp_path, gradient(), fps=8)
    # A full disk: the kernel's own one, which accepts no byte.
    write_mp4(tmp_path / "clip.mp4", gradient(frames=1), fps=8)
    before = (tmp_path / "clip.mp4").read_bytes()
    opened = av.open
    monkeypatch.setattr(av, "open", lambda path, *args, **settings: opened("/dev/full", *args, **settings))
    with pytest.raises(UserError, match=r"clip\.mp4 cannot be written.*[Nn]o space.*free some space"):
        write_mp4(tmp_path / "clip.mp4", gradient(frames=40), fps=8)
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
    assert (tmp_path / "clip.mp4").read_bytes() == before


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "clip.mp4"
    with pytest.raises(UserError, match="does not exist"):
        read_mp4(path)
    for content in (b"", b"hello" * 100):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"clip\.mp4 cannot be read as a video"):
            read_mp4(path)
    write_mp4(path, gradient(), fps=8)
    whole = path.read_bytes()
    frames, refused = read_mp4(path).frames, 0
    for kept in range(8, len(whole), len(whole) // 40):
        path.write_bytes(whole[:kept])
        try:
            # All that may be cut off unnoticed is the name of the program at the end.
            np.testing.assert_array_equal(read_mp4(path).frames, frames)
        except UserError:
            refused += 1
    assert refused >= 35


def test_side_by_side():
    videos = [np.full((3, 8, 60, 3), level, np.uint8) for level in (50, 100, 200)]
    row = side_by_side(videos, ["one", "two", "three"], scale=2)
    strip = row.shape[1] - 16
    assert row.shape == (3, 16 + strip, 3 * 120 + 2 * 4, 3)
    for index, level in enumerate((50, 100, 200)):
        assert (row[:, strip:, index * 124 : index * 124 + 120] == level).all()
    # Each label is drawn: light pixels on a dark strip, other ones for other words.
    labels = [row[0, :strip, index * 124 : index * 124 + 120] for index in range(3)]
    assert all(label.max() > 200 and np.median(label) < 40 for label in labels)
    assert not np.array_equal(labels[0], labels[1])

    grid = side_by_side(videos, ["one", "two", "three"], scale=2, columns=2)
    assert grid.shape == (3, 2 * (16 + strip) + 4, 2 * 120 + 4, 3)
    assert (grid[:, -16:, :120] == 200).all()
    assert grid[:, -16:, 124:].max() < 40


def test_long_labels_are_cut():
    video = np.zeros((1, 8, 60, 3), np.uint8)
    cut = side_by_side([video], ["a red disc moving left quickly on white"])
    assert cut.shape[2] == 60
    assert side_by_side([video[:, :, :3]], ["wide"]).shape[2] == 3


def test_side_by_side_refuses():
    video = np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(UserError, match="0 videos with 0 labels"):
        side_by_side([], [])
    with pytest.raises(UserError, match="2 videos with 1 labels"):
        side_by_side([video, video], ["one"])
    with pytest.raises(UserError, match=r"different shapes.*\(1, 8, 8, 3\)"):
        side_by_side([video, video[:1]], ["one", "two"])
