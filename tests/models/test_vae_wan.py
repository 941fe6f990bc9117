"""Wan's VAE: folders; counts; what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import models
from models.vae_folders import build_vae
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

SMALL = {
    "_class_name": "AutoencoderKLWan", "base_dim": 6, "z_dim": 5, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": [0.1, -0.2, 0.3, 0.0, 1.0],
    "latents_std": [1.5, 2.0, 0.5, 1.0, 3.0],
}  # fmt: skip


@pytest.fixture(scope="module")
def vae():
    random = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: build_vae(SMALL))
    return jax.tree.map(lambda a: jnp.asarray(random.standard_normal(a.shape), a.dtype), abstract)


def test_saved_and_loaded(vae, tmp_path):
    models.save_vae(vae, tmp_path / "vae")
    loaded = models.load_vae(tmp_path / "vae")
    assert jax.tree.structure(loaded) == jax.tree.structure(vae)
    for saved, read in zip(jax.tree.leaves(vae), jax.tree.leaves(loaded), strict=True):
        assert saved.dtype == read.dtype
        assert (np.asarray(saved) == np.asarray(read)).all()
    half = models.load_vae(tmp_path / "vae", dtype=jnp.bfloat16)
    assert half.decoder.conv_in.weight[...].dtype == jnp.bfloat16
    assert half.decoder.norm_out.gamma[...].dtype == jnp.float32


def test_published_size():
    vae = jax.eval_shape(lambda: build_vae({"_class_name": "AutoencoderKLWan"}))
    assert parameter_count(vae) == 126_892_531  # of diffusers' AutoencoderKLWan(), which Wan 2.1's folder has


def test_normalized_latents_have_the_configs_statistics(vae):
    mean, std = np.array(SMALL["latents_mean"]), np.array(SMALL["latents_std"])
    own = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)), jnp.float32)
    np.testing.assert_allclose(vae.normalize(own), (np.asarray(own) - mean) / std, rtol=1e-5, atol=1e-6)
    # Two roundings of float32.
    np.testing.assert_allclose(vae.denormalize(vae.normalize(own)), own, rtol=1e-5, atol=1e-6)


def test_a_sample_of_the_posterior_has_its_moments():
    shape = (1, 40, 25, 20, 1)
    posterior = models.Posterior(jnp.full(shape, 3.0), jnp.full(shape, float(np.log(4.0))))
    drawn = posterior.sample(jax.random.key(0))
    # 20,000 draws: the mean is off by some 2 / sqrt(20000) = 0.014, the deviation by 0.01.
    assert abs(float(drawn.mean()) - 3) < 0.06
    assert abs(float(drawn.std()) - 2) < 0.04
    assert (posterior.mode() == 3).all()


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((1, 8, 16, 16, 3), "8 frames"), ((1, 7, 16, 16, 3), "7 frames"), ((1, 0, 16, 16, 3), "shape"),
        ((1, 5, 12, 16, 3), "height 12"), ((1, 5, 16, 20, 3), "width 20"), ((1, 5, 16, 16, 4), "shape"),
        ((5, 16, 16, 3), "shape"), ((3,), "shape"),
    ],
)  # fmt: skip
def test_videos_that_do_not_fit(vae, shape, said):
    with pytest.raises(UserError, match=said):
        vae.encode(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 2, 2, 2, 4), (2, 2, 2, 5), (1, 0, 2, 2, 5)])
def test_latents_that_do_not_fit(vae, shape):
    with pytest.raises(UserError, match="latents of shape"):
        vae.decode(jnp.zeros(shape))


def test_missing_and_unknown_weights_are_named(vae, tmp_path):
    models.save_vae(vae, tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_res_blocks": 2}))
    with pytest.raises(UserError, match="missing") as caught:
        models.load_vae(tmp_path / "vae")
    assert "decoder.up_blocks.0.resnets.2.conv1.bias (missing)" in caught.value.items
    config.write_text(json.dumps({**json.loads(config.read_text()), "dim_mult": [1, 2, 4], "num_res_blocks": 1,
                                  "temperal_downsample": [False, True]}))  # fmt: skip
    with pytest.raises(UserError, match="unknown") as caught:
        models.load_vae(tmp_path / "vae")
    assert "decoder.up_blocks.3.resnets.0.conv1.bias (unknown)" in caught.value.items


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"is_residual": True}, "Wan 2.2"), ({"patch_size": 2}, "Wan 2.2"), ({"attn_scales": [0.5]}, "attn_scales"),
        ({"temperal_downsample": [True]}, "temperal_downsample"), ({"dim_mult": []}, "dim_mult"),
        ({"latents_std": [1.0] * 4}, "latents_std"), ({"latents_std": [1.0, 1.0, 0.0, 1.0, 1.0]}, "not positive"),
        ({"latents_mean": ["a"] * 5}, "latents_mean"), ({"base_dim": 3, "dim_mult": [1, 1, 1, 1]}, "halved"),
        ({"z_dim": 0}, "z_dim"), ({"extra": 1}, "fields"), ({"_class_name": "WanTransformer3DModel"}, "denoiser"),
        ({"_class_name": "AutoencoderNew"}, "not a VAE that is known"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: build_vae({**SMALL, **change}))
