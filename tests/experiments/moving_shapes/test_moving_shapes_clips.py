"""The renderer: what a caption says is what is drawn, and the folding is the pipeline's."""

import numpy as np
import pytest

from experiments.moving_shapes.captions import BACKGROUNDS, COLORS, SHAPES, SPEEDS, Caption, all_captions
from experiments.moving_shapes.clips import FRAMES, RADII, SIZE, clip, coverage, fold
from experiments.moving_shapes.train import pipeline


def grid(step: float = 1.0):
    """Pixel centres around the origin, `step` pixels apart."""
    y, x = np.mgrid[-12:12:step, -12:12:step] + step / 2
    return x.astype(np.float32), y.astype(np.float32)


def test_clip_is_a_function_of_caption_seed_and_index():
    caption = Caption("red", "ring", "left")
    first = np.asarray(clip(caption, seed=3, index=5))
    assert first.shape == (FRAMES, SIZE, SIZE, 3)
    assert first.dtype == np.float32
    assert (first == np.asarray(clip(caption, seed=3, index=5))).all()
    assert (first != np.asarray(clip(caption, seed=3, index=6))).any()
    assert (first != np.asarray(clip(caption, seed=4, index=5))).any()


@pytest.mark.parametrize("caption", all_captions()[5::97], ids=str)
def test_clip_shows_the_colours_and_moves_as_said(caption):
    video = np.asarray(clip(caption, seed=1))
    background = video[0, 0, 0]
    if caption.background:
        np.testing.assert_allclose(background, BACKGROUNDS[caption.background], atol=1e-6)  # float32 constants
    axis = np.array(COLORS[caption.color]) - background
    alpha = (video - background) @ axis / (axis @ axis)  # (frames, height, width)
    assert alpha.max() > 0.99  # some pixel is covered wholly, so it has the colour itself
    # The shape never leaves the frame, so its area is the same in all frames, but for the antialiasing: exact
    # for upright edges only, it errs by some hundredths at each of a ring's 70 edge pixels.
    areas = alpha.sum(axis=(1, 2))
    assert np.ptp(areas) < 0.03 * areas.mean()
    y, x = np.mgrid[:SIZE, :SIZE] + 0.5
    centers = np.stack([(alpha * x).sum((1, 2)), (alpha * y).sum((1, 2))], 1) / areas[:, None]
    step = np.diff(centers, axis=0).mean(0)
    along = {"left": -step[0], "right": step[0], "up": -step[1], "down": step[1]}[caption.direction]
    slowest, fastest = zip(*SPEEDS.values())
    low, high = SPEEDS[caption.speed] if caption.speed else (min(slowest), max(fastest))
    assert low - 0.02 <= along <= high + 0.02  # the centroid of an antialiased image moves within 1/50 pixel


def test_antialiasing_agrees_with_counting_subpixels():
    for number, name in enumerate(SHAPES):
        x, y = grid()
        soft = np.asarray(coverage(number, 6.0, x, y))
        fine = np.asarray(coverage(number, 6.0 * 8, *(8 * a for a in grid(1 / 8))))  # 8 x 8 subpixels
        exact = fine.reshape(24, 8, 24, 8).mean(axis=(1, 3))
        # A distance is not an area: at slanted edges and corners single pixels differ by up to a fifth.
        assert np.abs(soft - exact).max() < 0.25, name
        assert abs(soft.sum() - exact.sum()) < 0.02 * exact.sum(), name


def test_shapes_are_clearly_distinct():
    x, y = grid()
    for radius in RADII:
        images = [np.asarray(coverage(number, radius, x, y)) for number in range(len(SHAPES))]
        for i, one in enumerate(images):
            for other in images[:i]:
                overlap = np.minimum(one, other).sum() / np.maximum(one, other).sum()
                assert overlap < 0.75  # ring in disc, the most alike, share three quarters of the disc


def test_folding_is_the_pipelines():
    video = np.stack([np.asarray(clip(caption, seed=0)) for caption in all_captions()[::400]])
    latents = np.asarray(fold(video))
    assert latents.shape == (3, FRAMES, 8, 8, 12)
    assert np.abs(latents).max() <= 1
    np.testing.assert_allclose(pipeline().fold(video), latents, atol=1e-6)  # sums of four in another order, float32
    assert pipeline().decode(latents).shape == video.shape
    folded = fold(video, 3)
    assert folded.shape == (3, FRAMES // 3, 8, 8, 36)
    np.testing.assert_allclose(pipeline("animatediff").fold(video), folded, atol=1e-6)
    np.testing.assert_array_equal(folded[:, 1, ..., 12:24], latents[:, 4])
    # Spelled out once: at latent (h, w), channel 6 p + 3 q + c is the mean of 2 x 2 pixels from (4 h + 2 p, 4 w + 2 q).
    mean = video[1, 4, 22:24, 28:30, 2].mean()
    assert latents[1, 4, 5, 7, 6 * 1 + 3 * 0 + 2] == pytest.approx(2 * mean - 1, abs=1e-6)
