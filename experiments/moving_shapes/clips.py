"""Clips drawn by rule: one antialiased shape moves in a straight line over a plain background.

The only renderer of the bench. It is written in jnp, so the training step draws its data on the device, and a
clip is a pure function of (caption, key).
"""

import dataclasses
from typing import Final

import einops
import jax
import jax.numpy as jnp
import numpy as np

from experiments.moving_shapes.captions import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Caption,
    all_captions,
)

FRAMES: Final = 9
SIZE: Final = 32  # pixels, height and width
POOL: Final = 2  # latents hold means of 2 x 2 pixels: a quarter of the tokens, and shapes are as clear
FACTOR: Final = 2  # space-to-depth: a latent position is 2 x 2 of those means
RADII: Final = (6.0, 7.25)  # pixels, half the width of a shape


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scene:
    """What is drawn, as numbers. A batch of scenes has a leading axis on every array."""

    color: jax.Array  # (3,) RGB in [0, 1]
    background: jax.Array  # (3,) RGB in [0, 1]
    shape: jax.Array  # () index into SHAPES
    radius: jax.Array  # () pixels
    start: jax.Array  # (2,) x, y of the centre in the first frame, pixels
    velocity: jax.Array  # (2,) x, y in pixels a frame


def coverage(shape: jax.Array, radius: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """The part of a pixel that a shape covers, in [0, 1].

    Args:
        shape: Index into SHAPES.
        radius: Half the shape's width in pixels.
        x, y: The pixel's centre relative to the shape's, any shape, in pixels; y grows downwards.

    A pixel at signed distance s (negative inside) is covered by 0.5 - s, clipped: exact for upright edges.
    """
    distance = jnp.hypot(x, y)
    disc = distance - radius
    ring = jnp.abs(distance - 0.75 * radius) - 0.25 * radius
    # An isosceles triangle, tip up, as wide and as high as the disc: half-planes left, right and below.
    slope = 1 / jnp.sqrt(5.0)  # normal of a side is (2, -1) / sqrt(5)
    triangle = jnp.maximum(slope * (2 * jnp.abs(x) - (y + radius)), y - radius)
    across = jnp.maximum(jnp.abs(x) - radius, jnp.abs(y) - 0.3 * radius)
    upright = jnp.maximum(jnp.abs(y) - radius, jnp.abs(x) - 0.3 * radius)
    cross = jnp.minimum(across, upright)
    signed = jnp.select(
        [shape == SHAPES.index("disc"), shape == SHAPES.index("ring"), shape == SHAPES.index("triangle")],
        [disc, ring, triangle],
        cross,
    )
    return jnp.clip(0.5 - signed, 0, 1)


def render(scene: Scene) -> jax.Array:
    """Draw one scene: float32 (frames, height, width, rgb) in [0, 1]."""
    centers = scene.start + jnp.arange(FRAMES, dtype=jnp.float32)[:, None] * scene.velocity  # (frames, xy)
    pixels = jnp.arange(SIZE, dtype=jnp.float32) + 0.5
    x = pixels[None, None, :] - centers[:, 0, None, None]  # (frames, 1, width)
    y = pixels[None, :, None] - centers[:, 1, None, None]  # (frames, height, 1)
    alpha = coverage(scene.shape, scene.radius, x, y)[..., None]  # (frames, height, width, 1)
    return scene.background + alpha * (scene.color - scene.background)


def _caption_table() -> dict[str, np.ndarray]:
    """One row a caption of `all_captions`: indices into the words; -1 for a word left unsaid."""

    def column(field: str, names: tuple[str, ...]) -> np.ndarray:
        values = (getattr(caption, field) for caption in all_captions())
        return np.array([-1 if value is None else names.index(value) for value in values], np.int32)

    return {
        "color": column("color", tuple(COLORS)),
        "shape": column("shape", SHAPES),
        "direction": column("direction", tuple(DIRECTIONS)),
        "speed": column("speed", tuple(SPEEDS)),
        "background": column("background", tuple(BACKGROUNDS)),
    }


_TABLE: Final = _caption_table()


def scene(caption: jax.Array, key: jax.Array) -> Scene:
    """A random scene that a caption describes; the shape stays inside the frame all the time.

    Args:
        caption: Index into `all_captions()`, int32 ().
        key: A jax key; size, exact speed, start, and what the caption leaves open come from it alone.
    """
    color, shape, direction, speed, background = (jnp.asarray(column)[caption] for column in _TABLE.values())
    keys = jax.random.split(key, 5)
    speed = jnp.where(speed < 0, jax.random.randint(keys[0], (), 0, len(SPEEDS)), speed)
    background = jnp.where(background < 0, jax.random.randint(keys[1], (), 0, len(BACKGROUNDS)), background)
    radius = jax.random.uniform(keys[2], minval=RADII[0], maxval=RADII[1])
    slowest, fastest = jnp.asarray(list(SPEEDS.values()), jnp.float32)[speed]
    pace = jax.random.uniform(keys[3], minval=slowest, maxval=fastest)
    velocity = pace * jnp.asarray(list(DIRECTIONS.values()), jnp.float32)[direction]
    # Uniform over the starts from which the shape neither begins nor ends outside.
    travel = (FRAMES - 1) * velocity
    low = radius + jnp.maximum(0, -travel)
    high = SIZE - radius - jnp.maximum(0, travel)
    start = low + jax.random.uniform(keys[4], (2,)) * (high - low)
    return Scene(
        color=jnp.asarray(list(COLORS.values()), jnp.float32)[color],
        background=jnp.asarray(list(BACKGROUNDS.values()), jnp.float32)[background],
        shape=shape, radius=radius, start=start, velocity=velocity,
    )  # fmt: skip


def clip(caption: Caption, *, seed: int, index: int = 0) -> jax.Array:
    """The clip number `index` of a seed for a caption: float32 (frames, height, width, rgb) in [0, 1]."""
    key = jax.random.fold_in(jax.random.key(seed), index)
    return _clip(jnp.int32(all_captions().index(caption)), key)


@jax.jit
def _clip(caption: jax.Array, key: jax.Array) -> jax.Array:
    return render(scene(caption, key))


def fold(video: jax.Array, frame_factor: int = 1) -> jax.Array:
    """Video (..., frames, 32, 32, rgb) in [0, 1] to latents (..., frames / n, 8, 8, 12 n) in [-1, 1].

    Means of 2 x 2 pixels, then space to depth, and n = `frame_factor` frames to one; the pipeline's decoder undoes the
    latter two and enlarges again.
    """
    small = einops.reduce(video, "... (h n) (w m) c -> ... h w c", "mean", n=POOL, m=POOL)
    sizes = {"t": frame_factor, "p": FACTOR, "q": FACTOR}
    return einops.rearrange(small * 2 - 1, "... (f t) (h p) (w q) c -> ... f h w (t p q c)", **sizes)
