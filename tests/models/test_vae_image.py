"""Stable Diffusion's VAE: parity with diffusers, whole and in tiles; frames in chunks; counts; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_parity import vae_errors

import models
from models.vae_folders import build_vae
from models.vae_image_layers import frames_in_chunks
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

SMALL = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 12], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 5, "norm_num_groups": 4, "sample_size": 8,
}  # fmt: skip
CASES = {
    # Ten images, so that a chunk of eight is followed by a shorter one; then tiles of 4 latents, one every 3.
    "published": {
        "config": SMALL, "batch": 2, "video": (5, 10, 14), "latents": (5, 5, 7),
        "calls": {
            "whole": {}, "tiles": {"tiling": [[4, 4], [3, 3]], "theirs": {"tile_sample_min_size": 8, "tile_latent_min_size": 4}},
        },
    },
    "bare": {
        "config": {
            **SMALL, "block_out_channels": [8, 8, 12], "down_block_types": ["DownEncoderBlock2D"] * 3,
            "up_block_types": ["UpDecoderBlock2D"] * 3, "use_quant_conv": False, "use_post_quant_conv": False,
            "mid_block_add_attention": False,
        }, "batch": 1, "video": (2, 8, 12), "latents": (2, 3, 2), "calls": {"whole": {}},
    },
}  # fmt: skip
CALLS = [f"{name}: {call}" for name, case in CASES.items() for call in case["calls"]]


@functools.cache
def errors() -> dict[str, float]:
    return vae_errors(CASES)


@pytest.mark.parametrize("name", CALLS)
def test_parity_with_diffusers(name):
    found = {key: error for key, error in errors().items() if key.startswith(f"{name}: ")}
    assert len(found) == 3
    # Rounding in float64, of some thousand sums in a row.
    assert max(found.values()) <= 1e-12, found


@pytest.mark.parametrize("at_once", [1, 2, 4, 6, 7])
def test_frames_in_chunks_keep_their_places(at_once):
    video = jnp.arange(2 * 3 * 4 * 5 * 2.0).reshape(2, 3, 4, 5, 2)
    seen = []

    def run(images):
        seen.append(images.shape[0])
        return images[:, ::2] + 1

    out = frames_in_chunks(run, video, at_once)
    assert (out == video[:, :, ::2] + 1).all()
    assert max(seen) <= at_once


def test_published_size():
    config = {
        "_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4, "sample_size": 512,
    }  # fmt: skip
    vae = jax.eval_shape(lambda: build_vae(config))
    assert parameter_count(vae) == 83_653_863  # of diffusers' AutoencoderKL with Stable Diffusion 1.5's configuration
    assert vae.config.default_tiling == models.Tiling((64, 64), (48, 48))
    assert vae.config.compression == (1, 8, 8)


@pytest.fixture(scope="module")
def vae():
    return build_vae({**SMALL, "scaling_factor": 0.5, "shift_factor": -0.25})


def test_latents_are_scaled_and_shifted(vae):
    own = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)), jnp.float32)
    np.testing.assert_allclose(vae.normalize(own), (np.asarray(own) + 0.25) * 0.5, rtol=1e-6, atol=1e-6)
    # Two roundings of float32.
    np.testing.assert_allclose(vae.denormalize(vae.normalize(own)), own, rtol=1e-6, atol=1e-6)


def test_inputs_that_do_not_fit(vae):
    with pytest.raises(UserError, match="height 9"):
        vae.encode(jnp.zeros((1, 2, 9, 8, 3)))
    with pytest.raises(UserError, match="latents of shape"):
        vae.decode(jnp.zeros((1, 2, 4, 4, 4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norm_num_groups": 5}, "norm_num_groups"), ({"act_fn": "gelu"}, "act_fn"),
        ({"up_block_types": ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"]}, "AttnUpDecoderBlock2D"),
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types"), ({"latents_mean": [0.0] * 5}, "latents_mean"),
        ({"block_out_channels": "wide"}, "block_out_channels"), ({"shift_factor": "a"}, "shift_factor"),
        ({"sample_size": [8, 8]}, "sample_size"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        build_vae({**SMALL, **change})
