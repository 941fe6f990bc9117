"""The noise of a video: what it starts from, and what a stochastic solver adds at every step.

Both are functions of the video's own seed (and of the number of the step) alone, drawn with jax's default
generator (threefry), which does not depend on sharding: neither the batch a video is in nor the devices it is
on change them.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qvdjax.errors import UserError

GENERATOR = "threefry2x32"
# Folded into a video's key, it starts the stream of the steps' noise. The initial noise is drawn from the key
# itself, whose hashes of 0, 1, 2, ... are used up by it; no latents have 2**32 - 1 elements.
STEPS_STREAM = 2**32 - 1


def initial_noise(seeds: Sequence[int], shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Standard normal latents, each video's from `jax.random.key(seed)` of its own seed.

    Args:
        seeds: One per video, each in 0 .. 2**32 - 1.
        shape: Of one video's latents, (frames, height, width, channels).
        dtype: Of the result; the draw itself is float32, so the same video comes out under any of them.

    Returns:
        (batch, frames, height, width, channels). Raises `UserError` for a seed out of range.
    """
    check_seeds(seeds)

    def draw(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl=GENERATOR), tuple(shape), jnp.float32)

    return jnp.stack([draw(seed) for seed in seeds]).astype(dtype)


def step_keys(seeds: jax.Array) -> jax.Array:
    """The random key of each video's step noise: seeds (batch,) unsigned -> keys (batch,)."""

    def key(seed: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), np.uint32(STEPS_STREAM))

    return jax.vmap(key)(seeds)


def step_noise(keys: jax.Array, step: jax.Array | int, shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """The standard normal noise of one step, each video's from its own key.

    Args:
        keys: See `step_keys`, (batch,).
        step: Number of the step, 0 for the first.
        shape: Of one video's latents, (frames, height, width, channels).
        dtype: Of the result; the draw itself is float32.

    Returns:
        (batch, frames, height, width, channels).
    """

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.normal(jax.random.fold_in(key, step), tuple(shape), jnp.float32)

    return jax.vmap(draw)(keys).astype(dtype)


def check_seeds(seeds: Sequence[int]) -> np.ndarray:
    """The seeds as an array (batch,) uint32. Raises `UserError` for none and for one out of range."""
    # jax.random.key keeps 32 bits of a larger seed, so two seeds would silently mean one video.
    unusable = [str(seed) for seed in seeds if not 0 <= seed < 2**32]
    if unusable:
        raise UserError("seeds out of range", remedy="choose them from 0 to 4294967295", items=unusable)
    if len(seeds) == 0:
        raise UserError("no seed given", remedy="give one seed per video")
    return np.asarray(seeds, np.uint32)
