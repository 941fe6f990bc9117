"""The noise a video starts from."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from qvdjax.errors import UserError


def initial_noise(seeds: Sequence[int], shape: Sequence[int], dtype=jnp.float32) -> jax.Array:
    """Standard normal latents, each video's from its own seed alone.

    Neither the batch a video is in nor the devices it is on change its noise: the key of seed s is
    `jax.random.key(s)` of jax's default generator (threefry), which does not depend on sharding.

    Args:
        seeds: One per video, each in 0 .. 2**32 - 1.
        shape: Of one video's latents, (frames, height, width, channels).
        dtype: Of the result; the draw itself is float32, so the same video comes out under any of them.

    Returns:
        (batch, frames, height, width, channels). Raises `UserError` for a seed out of range.
    """
    # jax.random.key keeps 32 bits of a larger seed, so two seeds would silently mean one video.
    unusable = [str(seed) for seed in seeds if not 0 <= seed < 2**32]
    if unusable:
        raise UserError("seeds out of range", remedy="choose them from 0 to 4294967295", items=unusable)
    if not seeds:
        raise UserError("no seed given", remedy="give one seed per video")

    def draw(seed: int) -> jax.Array:
        return jax.random.normal(jax.random.key(seed, impl="threefry2x32"), tuple(shape), jnp.float32)

    return jnp.stack([draw(seed) for seed in seeds]).astype(dtype)
