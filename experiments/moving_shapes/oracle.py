"""What does a clip show? Measured from the pixels alone, for any clip.

The oracle knows the grammar of the bench, not the caption: it finds the background and what differs from it,
follows that through the frames, and compares its colour and form with rendered references. Where nothing is
clear it says None.
"""

import dataclasses
import functools
from typing import Final

import numpy as np

from experiments.moving_shapes.captions import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, SPEEDS, Caption

CONTRAST: Final = 0.25  # RGB distance from the background below which nothing is there
COLOR_TOLERANCE: Final = 0.32  # just under half the smallest distance between two colours (0.65)
BACKGROUND_TOLERANCE: Final = 0.25
LIKENESS: Final = 0.6  # correlation with a reference below which a form is none of the four
SLOWEST: Final = 0.4  # pixels a frame; below, nothing moves
BETWEEN: Final = 1.5  # pixels a frame, between slowly (to 1.1) and quickly (from 1.9)
FASTEST: Final = 4.0
WINDOW: Final = 21  # pixels, odd; a shape's surroundings that its form is read from
MIN_FRAMES: Final = 5  # frames in which a thing must be seen to have a direction


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What a clip shows; None where the oracle cannot say.

    Attributes:
        color, shape, direction, speed, background: Words of the grammar.
        velocity: (x, y) pixels a frame, or None.
        flicker: Mean absolute change from frame to frame, in units of the range [0, 1], after motion is taken
            away; 0 for clean clips.
        likeness: Correlation with the best reference in [-1, 1]; 0 where nothing is there.
    """

    color: str | None
    shape: str | None
    direction: str | None
    speed: str | None
    background: str | None
    velocity: tuple[float, float] | None
    flicker: float
    likeness: float


def measure(video: np.ndarray) -> Measurement:
    """Measure one clip.

    Args:
        video: (frames, height, width, rgb), nominally in [0, 1]; other values are clipped. A clip with NaN or
            infinity shows nothing.
    """
    video = np.asarray(video, np.float32)
    if video.ndim != 4 or video.shape[-1] != 3 or not np.isfinite(video).all() or min(video.shape[:3]) < 1:
        return Measurement(None, None, None, None, None, None, float("nan"), 0.0)
    video = np.clip(video, 0, 1)
    frames = video.shape[0]
    # The shape covers at most a sixth of a frame, so the median of a frame is background.
    backgrounds = np.median(video.reshape(frames, -1, 3), axis=1)  # (frames, rgb)
    plain = np.median(backgrounds, axis=0)
    distance = np.linalg.norm(video - backgrounds[:, None, None], axis=-1)  # (frames, height, width)
    found = [_locate(distance[f]) for f in range(frames)]
    seen = [f for f in range(frames) if found[f] is not None]
    background = _nearest(plain, BACKGROUNDS, BACKGROUND_TOLERANCE)
    if not seen:
        return Measurement(None, None, None, None, background, None, _change(video), 0.0)

    centers = {f: found[f][0] for f in seen}
    masks = {f: found[f][1] for f in seen}
    inner = np.concatenate([video[f][masks[f]] for f in seen])
    color_value = np.median(inner, axis=0)
    color = _nearest(color_value, COLORS, COLOR_TOLERANCE)
    velocity = _velocity(centers)
    direction, speed = _direction(velocity)
    patches = np.stack([_patch(_alpha(video[f], backgrounds[f], color_value), centers[f]) for f in seen])
    shape, likeness = _form(patches.mean(axis=0))
    return Measurement(color, shape, direction, speed, background, velocity, _flicker(video, masks, centers), likeness)


def score(video: np.ndarray, caption: Caption) -> dict[str, float | None]:
    """Compare one clip with its caption.

    Returns:
        color, shape, direction: 1.0 if measured as said, else 0.0. speed, background: the same, but None
        where the caption leaves them open. flicker: as measured (NaN for a clip that is not finite).
    """
    seen = measure(video)
    scores: dict[str, float | None] = {
        name: float(getattr(seen, name) == getattr(caption, name)) for name in ("color", "shape", "direction")
    }
    for name in ("speed", "background"):
        said = getattr(caption, name)
        scores[name] = None if said is None else float(getattr(seen, name) == said)
    return {**scores, "flicker": seen.flicker}


def _locate(distance: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Centre (x, y) and mask (height, width) of what differs from the background in one frame, or None."""
    height, width = distance.shape
    # The smallest shape covers 7 % of a frame: the level that 3 % exceed lies inside it.
    level = np.quantile(distance, 0.97)
    if level < CONTRAST:
        return None
    mask = distance > 0.5 * level
    rows, columns = np.nonzero(mask)
    center = np.array([np.median(columns), np.median(rows)]) + 0.5
    y, x = np.mgrid[:height, :width] + 0.5
    for _ in range(3):  # leave out stray pixels: only what lies within the window counts
        near = mask & (np.maximum(abs(x - center[0]), abs(y - center[1])) <= WINDOW / 2)
        if not near.any():
            return None
        weight = np.where(near, np.minimum(distance, level), 0)
        center = np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()
    return center, near & (distance > 0.75 * level)


def _alpha(frame: np.ndarray, background: np.ndarray, color: np.ndarray) -> np.ndarray:
    """How much of each pixel is the thing's colour, (height, width) in [-0.5, 1.5]."""
    axis = color - background
    return np.clip((frame - background) @ axis / max(axis @ axis, 1e-6), -0.5, 1.5)


def _patch(image: np.ndarray, center: np.ndarray) -> np.ndarray:
    """The window around a centre, (WINDOW, WINDOW), read between pixels; 0 outside the image."""
    half = WINDOW // 2
    padded = np.pad(image, WINDOW)
    corner = center - 0.5 - half + WINDOW  # (x, y) of the window's first pixel in the padded image
    (column, row), (dx, dy) = np.floor(corner).astype(int), corner - np.floor(corner)
    block = padded[row : row + WINDOW + 1, column : column + WINDOW + 1]
    block = block[:-1] * (1 - dy) + block[1:] * dy
    return block[:, :-1] * (1 - dx) + block[:, 1:] * dx


@functools.cache
def _references() -> tuple[np.ndarray, np.ndarray]:
    """Shapes at many sizes around their centroids: unit vectors (references, pixels), shape numbers."""
    from experiments.moving_shapes.clips import coverage

    half = WINDOW // 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    vectors, numbers = [], []
    for number in range(len(SHAPES)):
        for radius in np.arange(3.0, 10.01, 0.5):
            image = np.asarray(coverage(number, radius, x, y))
            shift = (image * y).sum() / image.sum()  # a triangle's centroid lies below its middle
            image = np.asarray(coverage(number, radius, x, y + shift))
            vectors.append(_unit(image))
            numbers.append(number)
    return np.stack(vectors), np.array(numbers)


def _unit(image: np.ndarray) -> np.ndarray:
    vector = image.ravel() - image.mean()
    return vector / max(np.linalg.norm(vector), 1e-6)


def _form(patch: np.ndarray) -> tuple[str | None, float]:
    """The shape whose reference correlates best, and that correlation."""
    vectors, numbers = _references()
    likeness = vectors @ _unit(patch)
    best = int(np.argmax(likeness))
    return (SHAPES[numbers[best]] if likeness[best] >= LIKENESS else None), float(likeness[best])


def _nearest(value: np.ndarray, palette: dict[str, tuple[float, ...]], tolerance: float) -> str | None:
    distances = {name: float(np.linalg.norm(value - np.array(known))) for name, known in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= tolerance else None


def _velocity(centers: dict[int, np.ndarray]) -> tuple[float, float] | None:
    """Median slope over all pairs of frames (Theil-Sen): a few frames that went wrong do not matter."""
    if len(centers) < MIN_FRAMES:
        return None
    frames = sorted(centers)
    slopes = [(centers[b] - centers[a]) / (b - a) for i, a in enumerate(frames) for b in frames[i + 1 :]]
    x, y = np.median(slopes, axis=0)
    return float(x), float(y)


def _direction(velocity: tuple[float, float] | None) -> tuple[str | None, str | None]:
    if velocity is None:
        return None, None
    along = max(abs(velocity[0]), abs(velocity[1]))
    across = min(abs(velocity[0]), abs(velocity[1]))
    if not SLOWEST <= along <= FASTEST or across > along / 2:
        return None, None
    direction = max(DIRECTIONS, key=lambda name: np.dot(DIRECTIONS[name], velocity))
    return direction, tuple(SPEEDS)[0] if along < BETWEEN else tuple(SPEEDS)[1]


def _change(video: np.ndarray) -> float:
    """Mean absolute change between neighbouring frames."""
    return float(np.abs(np.diff(video, axis=0)).mean()) if len(video) > 1 else 0.0


def _flicker(video: np.ndarray, masks: dict[int, np.ndarray], centers: dict[int, np.ndarray]) -> float:
    """Change between neighbouring frames: of pixels away from the thing, and of the thing's own colour."""
    changes = []
    for frame in range(len(video) - 1):
        away = np.ones(video.shape[1:3], bool)
        for f in (frame, frame + 1):
            if f in centers:
                away &= ~_around(centers[f], away.shape)
        total = np.abs(video[frame + 1] - video[frame])[away].sum()
        count = 3 * away.sum()
        if frame in masks and frame + 1 in masks:
            before, after = (np.median(video[f][masks[f]], axis=0) for f in (frame, frame + 1))
            size = masks[frame].sum()
            total += np.abs(after - before).sum() * size
            count += 3 * size
        changes.append(total / max(count, 1))
    return float(np.mean(changes)) if changes else 0.0


def _around(center: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return np.maximum(abs(x - center[0]), abs(y - center[1])) <= WINDOW / 2
