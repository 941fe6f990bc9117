"""CogVideoX's VAE: counts; what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.vae_folders import build_vae
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

SMALL = {
    "_class_name": "AutoencoderKLCogVideoX", "block_out_channels": [8, 12, 12], "latent_channels": 5,
    "down_block_types": ["CogVideoXDownBlock3D"] * 3, "up_block_types": ["CogVideoXUpBlock3D"] * 3,
    "layers_per_block": 1, "norm_num_groups": 4, "norm_eps": 1e-3, "sample_height": 16, "sample_width": 24,
}  # fmt: skip


def test_published_size():
    vae = jax.eval_shape(lambda: build_vae({"_class_name": "AutoencoderKLCogVideoX"}))
    assert parameter_count(vae) == 215_583_907  # of diffusers' AutoencoderKLCogVideoX(), as CogVideoX-2B's folder
    assert vae.config.default_tiling == models.Tiling((30, 45), (25, 36))
    assert vae.config.compression == (4, 8, 8)


def test_images_of_inverted_scale():
    own = jnp.asarray(np.random.default_rng(0).standard_normal((1, 1, 2, 2, 5)), jnp.float32)
    for inverted, factor in ((False, 0.7), (True, 1 / 0.7)):
        config = {**SMALL, "scaling_factor": 0.7, "invert_scale_latents": inverted}
        vae = jax.eval_shape(functools.partial(build_vae, config))
        # Two roundings of float32.
        np.testing.assert_allclose(vae.normalize_image(own), own * factor, rtol=1e-6)
        np.testing.assert_allclose(vae.normalize(own), own * 0.7, rtol=1e-6)
        np.testing.assert_allclose(vae.denormalize(vae.normalize(own)), own, rtol=1e-6)


def test_inputs_that_do_not_fit():
    vae = jax.eval_shape(lambda: build_vae(SMALL))
    for frames in (2, 3, 6, 7, 11):
        with pytest.raises(UserError, match=f"{frames} frames"):
            vae.encode(jnp.zeros((1, frames, 8, 8, 3)))
    with pytest.raises(UserError, match="width 10"):
        vae.encode(jnp.zeros((1, 9, 8, 10, 3)))
    with pytest.raises(UserError, match="shape"):
        vae.encode(jnp.zeros((9, 8, 8, 3)))
    with pytest.raises(UserError, match="latents of shape"):
        vae.decode(jnp.zeros((1, 2, 4, 4, 4)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_quant_conv": True}, "use_quant_conv"), ({"temporal_compression_ratio": 3}, "temporal_compression_ratio"),
        ({"temporal_compression_ratio": 8}, "temporal_compression_ratio"), ({"norm_num_groups": 7}, "norm_num_groups"),
        ({"down_block_types": ["CogVideoXDownBlock3D", "DownBlock", "CogVideoXDownBlock3D"]}, "DownBlock"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: build_vae({**SMALL, **change}))
