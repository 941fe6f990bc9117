"""The Wan model: parity with diffusers, timesteps a token, remat, sizes, parameter counts."""

import json
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_models import WAN, WAN_I2V, wan, wan_inputs

import models
from qvdjax.errors import UserError

PARITY = """
import json, sys
import jax, jax.numpy as jnp, numpy as np, torch
from diffusers import WanTransformer3DModel
import models

config, folder = json.loads(sys.argv[1]), sys.argv[2]
torch.manual_seed(0)
reference = WanTransformer3DModel(**{k: v for k, v in config.items() if not k.startswith("_")}).double().eval()
with torch.no_grad():
    for parameter in reference.parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
        parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.5))
reference.save_pretrained(folder)
model = models.load(folder)

random = np.random.default_rng(0)
tokens = 512 if config.get("image_dim") else 7  # diffusers takes all but the last 512 for the image's
latents = random.standard_normal((2, config["in_channels"], 3, 8, 6))
context = random.standard_normal((2, tokens, 24))
image = {"encoder_hidden_states_image": random.standard_normal((2, 6, config["image_dim"]))} if tokens == 512 else {}
errors = {}
for name, timestep in json.loads(sys.argv[3]).items():
    timestep = np.asarray(timestep, np.float64)
    with torch.no_grad():
        theirs = reference(
            *(torch.tensor(a) for a in (latents, timestep, context)), **{k: torch.tensor(v) for k, v in image.items()}
        ).sample.numpy()
    given, shown = np.split(latents.transpose(0, 2, 3, 4, 1), [config["out_channels"]], axis=-1)
    more = {**image, **({"image_latents": shown} if shown.size else {})}
    ours = jax.jit(lambda m, *a, **k: m(*a, **k))(model, jnp.asarray(given), timestep, context, **more)
    assert ours.dtype == jnp.float64
    ours = np.asarray(ours).transpose(0, 4, 1, 2, 3)
    errors[name] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
print(json.dumps(errors))
"""


def parity(tmp_path, config, timesteps) -> dict[str, float]:
    """Relative L2 errors against diffusers in float64, in a process of its own (JAX's 64 bits are global)."""
    arguments = [json.dumps(config), str(tmp_path / "reference"), json.dumps(timesteps)]
    environment = {**os.environ, "JAX_ENABLE_X64": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", PARITY, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


TOKENS = 3 * 4 * 3
run = jax.jit(lambda model, inputs: model(**inputs))


@pytest.mark.parametrize(("name", "fields"), {
    "plain": {}, "no cross-attention norm": {"cross_attn_norm": False}, "uneven rope": {"attention_head_dim": 34},
    "two frames a patch": {"patch_size": [3, 2, 1]}, "image to video": WAN_I2V,
}.items())  # fmt: skip
def test_parity_with_diffusers(tmp_path, name, fields):
    timesteps = {"zero": [0, 0], "ordinary": [999, 317]}
    if name == "plain":
        timesteps["a token"] = [[0] * TOKENS, [0] * TOKENS]
        timesteps["a token, ordinary"] = [[999] * 20 + [0] * (TOKENS - 20), [317] * TOKENS]
    errors = parity(tmp_path, {**WAN, **fields}, timesteps)
    for case, error in errors.items():
        # diffusers computes norms, modulation and the timestep's sinusoid in float32 even for float64 models. At
        # timestep 0 the sinusoid is exact and rounding of the rest stays below 1e-6; at ordinary timesteps the
        # float32 sinusoid of a large argument is off by up to 3e-5.
        assert error <= (5e-5 if "ordinary" in case else 1e-6), errors


@pytest.mark.parametrize(("fields", "count"), [
    ({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, 1_418_996_800),
    ({}, 14_288_491_584),
    ({"in_channels": 36, "out_channels": 16, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16_394_878_784),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(fields, count):
    model = models.abstract({"_class_name": "WanTransformer3DModel", **fields})
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


def test_every_parameter_names_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(models.abstract(WAN))):
        array, axes = variable.get_value(), variable.get_metadata("axes")
        leading = 1 if path[0] == "stacks" else 0
        assert array.ndim == leading + len(axes), path


def test_one_timestep_for_all_tokens_or_the_same_for_each():
    model, inputs = wan(), wan_inputs()
    spread = jnp.broadcast_to(inputs["timestep"][:, None], (2, TOKENS))
    # The same operations on equal numbers, in another shape: float32 rounding.
    chex.assert_trees_all_close(run(model, inputs), run(model, {**inputs, "timestep": spread}), atol=1e-5)


def test_remat_changes_neither_value_nor_gradient():
    model, inputs = wan(), wan_inputs()
    loss = lambda m, remat: (m(**inputs, remat=remat) ** 2).mean()  # noqa: E731
    plain, remat = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(model, r) for r in (False, True))
    # Recomputation fuses differently: float32 rounding.
    chex.assert_trees_all_close(jax.tree.leaves(plain), jax.tree.leaves(remat), rtol=1e-3, atol=1e-5)


def test_bfloat16_keeps_its_float32_islands():
    model, inputs = wan(dtype=jnp.bfloat16), wan_inputs()
    out = run(model, inputs)
    assert out.dtype == jnp.bfloat16
    exact = run(wan(), inputs)  # the same draws, rounded to bfloat16 above
    error = jnp.linalg.norm(out.astype(jnp.float32) - exact) / jnp.linalg.norm(exact)
    assert error < 0.05  # bfloat16 keeps 8 bits; three blocks of some ten roundings each


@pytest.mark.parametrize(("change", "message"), [
    ({"latents": jnp.zeros((2, 3, 7, 6, 5))}, "latent height 7 is no multiple"),
    ({"latents": jnp.zeros((2, 3, 8, 6, 4))}, "5 channels"),
    ({"latents": jnp.zeros((2, 40, 8, 6, 5))}, "rotary table"),
    ({"latents": jnp.zeros((2, 0, 8, 6, 5))}, "latent frames 0"),
    ({"context": jnp.zeros((2, 7, 23))}, "24"),
])  # fmt: skip
def test_wrong_sizes_are_said(change, message):
    with pytest.raises(UserError, match=message):
        wan()(**{**wan_inputs(), **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"encoder_hidden_states_image": None}, "follows an image, and there is none"),
    ({"encoder_hidden_states_image": jnp.zeros((2, 6, 19))}, r"give \(batch, tokens, 20\)"),
    ({"image_latents": None}, "9 channels.*, of which 4 may come as image_latents"),
    ({"image_latents": jnp.zeros((2, 2, 8, 6, 4))}, "do not fit latents"),
])  # fmt: skip
def test_wrong_images_are_said(change, message):
    model = wan(**WAN_I2V)
    inputs = {**wan_inputs(), "image_latents": jnp.zeros((2, 3, 8, 6, 4)),
              "encoder_hidden_states_image": jnp.zeros((2, 6, 20))}  # fmt: skip
    with pytest.raises(UserError, match=message):
        model(**{**inputs, **change})
    with pytest.raises(UserError, match="does not fit this model; leave it out"):
        wan()(**wan_inputs(), encoder_hidden_states_image=inputs["encoder_hidden_states_image"])


@pytest.mark.parametrize(("config", "message"), [
    ({"_class_name": "Magic"}, "not known"),
    ({**WAN, "wings": 2}, "fields"),
    ({**WAN, "num_layers": 0}, "positive integer"),
    ({**WAN, "ffn_dim": "many"}, "positive integer"),
    ({**WAN, "qk_norm": "other"}, "qk_norm"),
    ({**WAN, "attention_head_dim": 33}, "attention_head_dim 33 is odd; .*make it even"),
    ({**WAN, "image_dim": 1280}, "image_dim 1280 and added_kv_proj_dim None: one without the other"),
    ({**WAN_I2V, "added_kv_proj_dim": 24}, "added_kv_proj_dim 24 beside tokens of 64 features"),
    ({**WAN_I2V, "in_channels": 5}, "5 channels become 5; .*an image's channels"),
    ({**WAN, "in_channels": 4}, "4 channels become 5"),
    ({**WAN_I2V, "pos_embed_seq_len": 514}, "first and a last frame"),
    ({**WAN, "num_layers": 1001}, "num_layers is 1001; it must be a positive integer of at most 1000$"),
    ({**WAN, "ffn_dim": 2**20 + 1}, "ffn_dim is 1048577; .* at most 1048576"),
    ({**WAN, "in_channels": 10**400}, r"in_channels is 10{39}\.\.\.; "),
    ({**WAN, "rope_max_seq_len": True}, "rope_max_seq_len is True"),
    ({**WAN, "pos_embed_seq_len": 2**40}, "pos_embed_seq_len is 1099511627776"),
    ({**WAN, "patch_size": [1, 2]}, "patch_size is .*; it must be 3 positive integers"),
    ({**WAN, "patch_size": [1, 0, 2]}, "patch_size is .*; it must be 3 positive integers"),
    ({**WAN, "patch_size": [1, 2**60, 2]}, "patch_size is"),
    ({**WAN, "patch_size": 2}, "patch_size is 2"),
    ({**WAN, "eps": "small"}, "eps is 'small'; it must be a positive number"),
    ({**WAN, "eps": float("nan")}, "eps is nan"),
    ({**WAN, "cross_attn_norm": "yes"}, "cross_attn_norm is 'yes'; it must be true or false"),
])  # fmt: skip
def test_wrong_configurations_are_said(config, message):
    with pytest.raises(UserError, match=message):
        models.parse_config(config)


@pytest.mark.parametrize(("name", "value"), [("num_layers", 1000), ("ffn_dim", 2**20), ("text_dim", 2**20)])
def test_the_largest_credible_sizes_are_taken(name, value):
    assert getattr(models.parse_config({**WAN, name: value}), name) == value
    models.abstract({**WAN, name: value})  # which is all that a look at the folder's table needs


def test_a_config_survives_the_round_trip():
    config = models.parse_config(WAN)
    assert models.parse_config(config.to_dict()) == config
    assert np.prod(config.rope_widths) > 0
    assert sum(config.rope_widths) == config.attention_head_dim
