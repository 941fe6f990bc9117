"""The VAEs of HunyuanVideo and Stable Video Diffusion: counts, scales, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.vae_folders import build_vae
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

HUNYUANVIDEO = {"_class_name": "AutoencoderKLHunyuanVideo"}
TEMPORAL = {
    "_class_name": "AutoencoderKLTemporalDecoder", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2,
    "down_block_types": ["DownEncoderBlock2D"] * 4, "sample_size": 768,
}  # fmt: skip


def abstract(config: dict):
    return jax.eval_shape(lambda: build_vae(config))


# Those of diffusers' classes with the published configurations.
@pytest.mark.parametrize(("config", "count"), [(HUNYUANVIDEO, 246_478_803), (TEMPORAL, 97_742_847)])
def test_published_size(config, count):
    assert parameter_count(abstract(config)) == count


@pytest.mark.parametrize(("config", "factor"), [(HUNYUANVIDEO, 0.476986), (TEMPORAL, 0.18215)])
def test_latents_are_scaled(config, factor):
    vae = abstract(config)
    own = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)), jnp.float32)
    # Two roundings of float32.
    np.testing.assert_allclose(vae.normalize(own), own * factor, rtol=1e-6)
    np.testing.assert_allclose(vae.denormalize(vae.normalize(own)), own, rtol=1e-6)


def test_inputs_that_do_not_fit():
    hunyuanvideo, temporal = abstract(HUNYUANVIDEO), abstract(TEMPORAL)
    for frames in (2, 4, 8, 11):
        with pytest.raises(UserError, match=f"{frames} frames"):
            hunyuanvideo.encode(jnp.zeros((1, frames, 8, 8, 3)))
    for vae in (hunyuanvideo, temporal):
        with pytest.raises(UserError, match="height 12"):
            vae.encode(jnp.zeros((1, 5, 12, 8, 3)))
        with pytest.raises(UserError, match="latents of shape"):
            vae.decode(jnp.zeros((1, 2, 4, 4, 5)))
    with pytest.raises(UserError, match="0 frames at once"):
        temporal.decode(jnp.zeros((1, 2, 4, 4, 4)), frames_at_once=0)


@pytest.mark.parametrize(
    ("config", "change", "said"),
    [
        (HUNYUANVIDEO, {"temporal_compression_ratio": 8}, "temporal_compression_ratio"),
        (HUNYUANVIDEO, {"spatial_compression_ratio": 4}, "spatial_compression_ratio"),
        (HUNYUANVIDEO, {"norm_num_groups": 3}, "norm_num_groups"),
        (TEMPORAL, {"layers_per_block": 1}, "layers_per_block"),
        (TEMPORAL, {"block_out_channels": [128, 256, 512, 500]}, "500 channels"),
    ],
)
def test_configurations_that_are_refused(config, change, said):
    with pytest.raises(UserError, match=said):
        abstract({**config, **change})
