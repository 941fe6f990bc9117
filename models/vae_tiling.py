"""Videos encoded and decoded in overlapping parts that are blended into each other, as diffusers does it.

Tiles of a frame and sections in time do not see each other, so the result is another one than without: it takes the
memory of a part, and the overlap hides the seams.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from models.vae_protocol import VideoVAE
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How latents are cut; of videos the tiles are as many times as large as the VAE compresses.

    Attributes:
        tile: Height and width of a tile in latents.
        stride: Rows and columns of latents from one tile to the next. The rest of a tile overlaps with the next one.
    """

    tile: tuple[int, int]
    stride: tuple[int, int]

    def __post_init__(self):
        for tile, stride in zip(self.tile, self.stride, strict=True):
            if not 0 < stride <= tile:
                raise UserError(
                    f"tiles of {tile} positions every {stride}",
                    remedy="choose a stride of at least 1 and at most a tile",
                )

    def larger(self, times: tuple[int, int]) -> "Tiling":
        """The same in pixels, `times` rows and columns of which are one of latents."""
        grow = lambda sizes: tuple(size * factor for size, factor in zip(sizes, times, strict=True))  # noqa: E731
        return Tiling(grow(self.tile), grow(self.stride))


@dataclasses.dataclass(frozen=True)
class Sections:
    """How latents are cut in time, where a video's first frame is a latent frame of its own.

    Attributes:
        length: Latent frames of a section beside its first one, which only the first section keeps.
        stride: Latent frames from one section to the next. The rest of a section overlaps with the next one.
    """

    length: int
    stride: int

    def __post_init__(self):
        if not 0 < self.stride <= self.length:
            raise UserError(
                f"sections of {self.length} frames every {self.stride}",
                remedy="choose a stride of at least 1 and at most a section",
            )

    def longer(self, times: int) -> "Sections":
        """The same in frames of pixels, `times` of which are one of latents."""
        return Sections(self.length * times, self.stride * times)


def in_sections(
    run: Callable[[jax.Array], jax.Array], x: jax.Array, given: Sections | None, made: Sections | None
) -> jax.Array:  # fmt: skip
    """Apply a VAE to one section of frames after the other; to all of x at once where it is no longer than one.

    Args:
        run: (batch, frames, height, width, channels) -> (batch, frames', height', width', channels').
        x: (batch, frames, height, width, channels).
        given, made: The sections of x and of the result; None to apply it to all of x.
    """
    if given is None or x.shape[1] <= given.length:
        return run(x)
    before, parts = None, []
    for start in range(0, x.shape[1] - 1, given.stride):
        section = run(x[:, start : start + given.length + 1])
        if before is None:
            parts.append(section[:, : made.stride + 1])
        else:
            section = _blend(before, section[:, 1:], made.length - made.stride, axis=1)
            parts.append(section[:, : made.stride])
        before = section
    return jnp.concatenate(parts, axis=1)


Run = Callable[[VideoVAE, jax.Array], jax.Array]
"""Part of a VAE: (vae, (batch, frames, height, width, channels)) -> (batch, frames', height', width', channels')."""


def apply_to_video(run: Run, vae: VideoVAE, video: jax.Array, tiling: Tiling | None) -> jax.Array:
    """Encode a video, whole or in tiles. `run` is a function of a module: outside `jax.jit` it is compiled once."""
    if tiling is None:
        return _compiled(run, vae, video)
    return _tiled(run, vae, video, tiling.larger(vae.config.compression[1:]), tiling)


def apply_to_latents(run: Run, vae: VideoVAE, latents: jax.Array, tiling: Tiling | None) -> jax.Array:
    """Decode latents, whole or in tiles, as `apply_to_video`."""
    if tiling is None:
        return _compiled(run, vae, latents)
    return _tiled(run, vae, latents, tiling, tiling.larger(vae.config.compression[1:]))


def _tiled(run: Run, vae: VideoVAE, x: jax.Array, given: Tiling, made: Tiling) -> jax.Array:
    """Apply a VAE to one tile after the other; to all of x at once where it is no larger than a tile.

    Outside `jax.jit` each tile is a call of a compiled program, of which there is one a shape: at most four.

    Args:
        run, vae: What is applied.
        x: (batch, frames, height, width, channels).
        given, made: The tiles of x and of the result.
    """
    call = functools.partial(_compiled, run, vae)
    if x.shape[2] <= given.tile[0] and x.shape[3] <= given.tile[1]:
        return call(x)
    (height, width), (down, right) = given.tile, given.stride
    overlap = tuple(tile - stride for tile, stride in zip(made.tile, made.stride, strict=True))
    above, rows = None, []
    for top in range(0, x.shape[2], down):
        row = []
        for number, left in enumerate(range(0, x.shape[3], right)):
            tile = call(x[:, :, top : top + height, left : left + width])
            if above is not None:
                tile = _blend(above[number], tile, overlap[0], axis=2)
            if row:
                tile = _blend(row[-1], tile, overlap[1], axis=3)
            row.append(tile)
        rows.append(jnp.concatenate([tile[:, :, : made.stride[0], : made.stride[1]] for tile in row], axis=3))
        above = row
    return jnp.concatenate(rows, axis=2)


@functools.partial(jax.jit, static_argnums=0)
def _compiled(run, vae, x):
    return run(vae, x)


def _blend(before: jax.Array, after: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`after` with its beginning along an axis faded in over the end of `before`."""
    overlap = min(before.shape[axis], after.shape[axis], overlap)
    if overlap == 0:
        return after
    shape = [1] * after.ndim
    shape[axis] = overlap
    weight = (jnp.arange(overlap) / overlap).astype(after.dtype).reshape(shape)
    end = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, before.shape[axis], axis=axis)
    start = jax.lax.slice_in_dim(after, 0, overlap, axis=axis)
    rest = jax.lax.slice_in_dim(after, overlap, after.shape[axis], axis=axis)
    return jnp.concatenate([end * (1 - weight) + start * weight, rest], axis=axis)
