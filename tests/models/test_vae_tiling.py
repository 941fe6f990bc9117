"""Tiles and sections: where nothing depends on its surroundings they put the whole together again; what is refused."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from einops import repeat

import models
from models.vae_protocol import VideoVAE
from models.vae_tiling import apply_to_latents, apply_to_video, in_sections
from qvdjax.errors import UserError


class Fake(VideoVAE):
    """A VAE of 2 x 3 pixels to a latent, whose parts see single positions alone."""

    def __init__(self):
        self.config = Compression()


@dataclasses.dataclass(frozen=True)
class Compression:
    compression: tuple[int, int, int] = (4, 2, 3)


def enlarge(vae, latents):
    return repeat(latents, "b f h w c -> b f (h two) (w three) c", two=2, three=3)


def shrink(vae, video):
    return video[:, :, ::2, ::3]


@pytest.mark.parametrize(("tile", "stride"), [((2, 2), (1, 1)), ((3, 4), (2, 3)), ((4, 9), (4, 9)), ((9, 2), (5, 2))])
def test_tiles_of_independent_positions_are_the_whole(tile, stride):
    latents = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, 7, 8, 2)), jnp.float32)
    tiling = models.Tiling(tile, stride)
    video = apply_to_latents(enlarge, Fake(), latents, tiling)
    # Blending a value with itself rounds in float32.
    np.testing.assert_allclose(video, enlarge(None, latents), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(apply_to_video(shrink, Fake(), video, tiling), latents, rtol=1e-6, atol=1e-6)


def test_a_section_fades_into_the_next_one():
    # Every section is 0, 1, 2, ... as a whole: where half of it overlaps it goes evenly from one number to the next.
    numbers = iter(range(9))
    section = lambda x: jnp.full_like(x, next(numbers))  # noqa: E731
    made = in_sections(section, jnp.zeros((1, 9, 1, 1, 1)), models.Sections(4, 2), models.Sections(4, 2))
    # Section 0 keeps its first frame and 2 more; each other begins with 2 frames that were the end of the one before.
    np.testing.assert_allclose(made.reshape(-1), [0, 0, 0, 0, 0.5, 1, 1.5, 2, 2.5])


def test_sections_of_independent_frames_are_the_whole():
    video = jnp.asarray(np.random.default_rng(0).standard_normal((1, 12, 2, 2, 1)), jnp.float32)
    for length, stride in ((4, 3), (5, 5), (3, 1), (20, 4)):
        sections = models.Sections(length, stride)
        np.testing.assert_allclose(in_sections(lambda x: x, video, sections, sections), video, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [models.Sections, lambda length, stride: models.Tiling((4, length), (4, stride))])
@pytest.mark.parametrize(("length", "stride"), [(4, 0), (4, 5)])
def test_steps_that_leave_no_frame_or_a_gap_are_refused(kind, length, stride):
    with pytest.raises(UserError, match="every"):
        kind(length, stride)
