"""Stable Diffusion's VAE: frames in chunks; counts; what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import models
from models.vae_folders import build_vae
from models.vae_image_layers import frames_in_chunks
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

SMALL = {
    "_class_name": "AutoencoderKL", "block_out_channels": [8, 12], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "latent_channels": 5, "norm_num_groups": 4, "sample_size": 8,
}  # fmt: skip


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


def test_old_names_of_attention_are_read(tmp_path):
    random = np.random.default_rng(0)
    abstract = jax.eval_shape(lambda: build_vae(SMALL))
    vae = jax.tree.map(lambda a: jnp.asarray(random.standard_normal(a.shape), a.dtype), abstract)
    models.save_vae(vae, tmp_path / "new")
    weights = load_file(tmp_path / "new" / "diffusion_pytorch_model.safetensors")
    old = {}
    for name, tensor in weights.items():
        old_name = name
        for new, before in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            old_name = old_name.replace(f".{new}.", f".{before}.")
        old[old_name] = tensor
    assert len(set(old) - set(weights)) == 16  # weights and biases of four layers in two attentions
    (tmp_path / "old").mkdir()
    save_file(old, tmp_path / "old" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    loaded = models.load_vae(tmp_path / "old")
    for saved, read in zip(jax.tree.leaves(vae), jax.tree.leaves(loaded), strict=True):
        assert (np.asarray(saved) == np.asarray(read)).all()
    # A name of neither kind is named as it is in the file.
    save_file(
        {**old, "decoder.query.weight": old["quant_conv.bias"]},
        tmp_path / "old" / "diffusion_pytorch_model.safetensors",
    )
    with pytest.raises(UserError) as caught:
        models.load_vae(tmp_path / "old")
    assert caught.value.items == ("decoder.query.weight (unknown)",)


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
    return jax.eval_shape(lambda: build_vae({**SMALL, "scaling_factor": 0.5, "shift_factor": -0.25}))


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
        ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types"),
        ({"latents_mean": [0.0] * 5}, "latents_mean"),
        ({"block_out_channels": "wide"}, "block_out_channels"), ({"shift_factor": "a"}, "shift_factor"),
        ({"sample_size": [8, 8]}, "sample_size"),
    ],
)  # fmt: skip
def test_configurations_that_are_refused(change, said):
    with pytest.raises(UserError, match=said):
        jax.eval_shape(lambda: build_vae({**SMALL, **change}))
