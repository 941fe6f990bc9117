"""VAEs whose weights are codes: what they decode, their folders, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from vae_parity import COGVIDEOX, HUNYUANVIDEO, IMAGE, TEMPORAL, WAN

import models
import qvdjax
from models.vae_folders import build_vae
from qvdjax.checkpoint.variables import parameter_count
from qvdjax.errors import UserError

VAES = {"wan": WAN, "image": IMAGE, "cogvideox": COGVIDEOX, "hunyuanvideo": HUNYUANVIDEO, "temporal": TEMPORAL}
decode = jax.jit(lambda vae, latents: vae.decode(latents), compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    "name", ["wan", *(pytest.param(name, marks=pytest.mark.slow) for name in VAES if name != "wan")]
)
def test_weights_of_eight_bits_decode_nearly_the_same_and_are_read_back(name, tmp_path):
    vae = build_vae(VAES[name], key=jax.random.key(0))
    quantized = qvdjax.quantize(vae, "rtn-w8a16")
    rows = qvdjax.describe(quantized)
    assert {row["weight_bits"] for row in rows} == {8}
    assert parameter_count(quantized) == parameter_count(vae)
    # Codes are a quarter of the floats; scales, biases and norms of these narrow layers are not small beside them.
    assert sum(row["bytes"] for row in rows) < 0.75 * sum(row["float_bytes"] for row in rows)
    latents = jax.random.normal(jax.random.key(1), (1, 3, 4, 6, vae.config.latent_channels))
    whole, rounded = decode(vae, latents), decode(quantized, latents)
    assert rounded.dtype == jnp.float32
    # Some thirty convolutions in a row, each with errors of some 1e-3 to 1e-2 from eight bits a channel.
    assert 1e-3 < float(jnp.linalg.norm(rounded - whole) / jnp.linalg.norm(whole)) < 1e-1
    models.save_vae(quantized, tmp_path / "vae")
    loaded = models.load_vae(tmp_path / "vae")
    assert loaded.recipe_name == "rtn-w8a16"
    np.testing.assert_array_equal(decode(loaded, latents), rounded)
    half = models.load_vae(tmp_path / "vae", dtype=jnp.bfloat16)
    assert jax.eval_shape(half.decode, latents).dtype == jnp.bfloat16


def test_a_quantization_of_others_is_refused(tmp_path):
    models.save_vae(build_vae(IMAGE), tmp_path / "vae")
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(UserError, match="not qvdjax's"):
        models.load_vae(tmp_path / "vae")
    with pytest.raises(UserError, match="quantized already"):
        qvdjax.quantize(qvdjax.quantize(build_vae(IMAGE), "rtn-w8a16"), "rtn-w4a16")
