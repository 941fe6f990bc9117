"""Stable Video Diffusion's UNet: parity with diffusers, folders, quantized products, tables, inputs, counts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import layer_differences
from flax import nnx
from round_trip import check_round_trip
from small_models import UNET_SPATIO_TEMPORAL, unet_spatio_temporal, unet_spatio_temporal_inputs
from unet_parity import unet_errors

import models
import qvdjax
from qvdjax.checkpoint.variables import expected_tensors, parameter_count
from qvdjax.diffusion import EulerEDM
from qvdjax.errors import UserError

CASES = {
    "two levels": ({}, (3, 4, 6), 1),
    "three levels": (
        {
            "block_out_channels": [32, 64, 96], "layers_per_block": 2, "num_attention_heads": [2, 4, 3],
            "down_block_types": ["CrossAttnDownBlockSpatioTemporal"] * 2 + ["DownBlockSpatioTemporal"],
            "up_block_types": ["UpBlockSpatioTemporal"] + ["CrossAttnUpBlockSpatioTemporal"] * 2,
        }, (4, 8, 12), 2,
    ),
}  # fmt: skip


@functools.cache
def errors(name: str) -> dict[str, float]:
    fields, size, tokens = CASES[name]
    case = {
        "config": {**UNET_SPATIO_TEMPORAL, **fields}, "size": size, "tokens": tokens,
        "conditions": {"image_latents": (1, *size[1:], 3)}, "zero": {"added_time_ids": [[0.0] * 3] * 2},
        "ordinary": {"timestep": [1.6378, -1.5537], "added_time_ids": [[6.0, 127.0, 0.02], [24.0, 10.0, 0.1]]},
    }  # fmt: skip
    return unet_errors({name: case})


@pytest.mark.parametrize("name", ["two levels", pytest.param("three levels", marks=pytest.mark.slow)])
def test_parity_with_diffusers(name):
    found = errors(name)
    # diffusers computes sinusoids in float32: exact at 0, off by some 1e-7 for the numbers of the frames and by 1e-5
    # for a motion bucket of 127, of which the layers behind them leave a part.
    assert found[f"{name}: zero"] <= 1e-6, found
    assert found[f"{name}: ordinary"] <= 1e-5, found
    # The same weights in the same program; torch sums in an order that depends on where arrays lie (float64 rounding).
    assert found[f"{name}: saved by us"] <= 1e-13, found


# One level: down, middle, up twice. Compiling is what these tests cost, so the compiler takes no trouble.
ONE_LEVEL = {
    "block_out_channels": [32], "down_block_types": ["CrossAttnDownBlockSpatioTemporal"],
    "up_block_types": ["CrossAttnUpBlockSpatioTemporal"], "num_attention_heads": 2,
}  # fmt: skip
run = jax.jit(lambda model, inputs: model(**inputs), compiler_options={"xla_backend_optimization_level": 0})


def relative(one, other) -> float:
    """Relative L2 distance."""
    return float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))


def test_load_is_the_inverse_of_save(tmp_path):
    check_round_trip(unet_spatio_temporal(dtype=jnp.bfloat16), tmp_path)


def test_epsilons_of_the_norms():
    """Which of them diffusers hands on and which are a default of the block; 1e-6 for 1e-5 would hardly show."""
    model = models.abstract(UNET_SPATIO_TEMPORAL)
    found = {}
    for stack in model.stacks:
        for resnet in stack.block.resnets.values():
            for part in (resnet.spatial_res_block, resnet.temporal_res_block):
                found.setdefault(stack.prefix, set()).update({part.norm1.epsilon, part.norm2.epsilon})
    assert found == {
        "down_blocks.0": {1e-6}, "down_blocks.1": {1e-5}, "mid_block": {1e-5}, "up_blocks.0": {1e-6},
        "up_blocks.1": {1e-6},
    }  # fmt: skip
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.UNetSpatioTemporalConditionModel(
        **{key: value for key, value in UNET_SPATIO_TEMPORAL.items() if key != "_class_name"}
    )
    for path, norm in reference.named_modules():
        block = ".".join(path.split(".")[: 1 if path.startswith("mid") else 2])
        if "res_block.norm" in path:
            assert found[block] == {norm.eps}, path
    assert (model.conv_norm_out.epsilon, reference.conv_norm_out.eps) == (1e-5, 1e-5)


@pytest.mark.slow
def test_quantized_models_agree_in_both_executions(tmp_path):
    model, inputs = unet_spatio_temporal(**ONE_LEVEL), unet_spatio_temporal_inputs()
    quantized = qvdjax.quantize(model, "rtn-w8a8")
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    bits = lambda path: (rows[path]["weight_bits"], rows[path]["activation_bits"])  # noqa: E731
    resnet, transformer = "down_blocks.0.resnets.0", "mid_block.attentions.0"
    for name in (
        f"{resnet}.spatial_res_block.conv1", f"{resnet}.temporal_res_block.conv2", f"{transformer}.proj_in",
        f"{transformer}.temporal_transformer_blocks.0.ff_in.net.0.proj",
        f"{transformer}.temporal_transformer_blocks.0.attn2.to_k", f"{transformer}.transformer_blocks.0.attn1.to_q",
    ):  # fmt: skip
        assert bits(name) == (8, 8), name
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "add_embedding.linear_2",
                 f"{transformer}.time_pos_embed.linear_1"):  # fmt: skip
        assert bits(name) == (32, 32), name
    assert bits(f"{resnet}.temporal_res_block.time_emb_proj") == (8, 32)  # weights only
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    differences = layer_differences(loaded, inputs)
    assert len(differences) > 40
    # int32 sums against float32 sums of the same integers, up to 600 of them.
    assert max(differences) < 2e-6
    error = relative(run(loaded, inputs), run(model, inputs))
    # Some hundred products in a row, each with errors of some 1e-3 to 1e-2 from eight bits.
    assert 1e-3 < error < 2e-1


def test_the_mlp_of_the_timestep_becomes_tables():
    model, inputs = unet_spatio_temporal(**ONE_LEVEL), unet_spatio_temporal_inputs()
    timesteps = EulerEDM().schedule(4).timesteps
    tabulated = qvdjax.tabulate(model, timesteps)
    tables = {row["path"] for row in qvdjax.describe(tabulated) if row["execution"] == "table"}
    # ResNets' own layers see added_time_ids too.
    assert tables == {"time_embedding.linear_1", "time_embedding.linear_2"}
    inputs["timestep"] = jnp.asarray(timesteps[[0, 3]], jnp.float32)
    # The same products in another program: float32 rounding through five blocks.
    assert relative(run(tabulated, inputs), run(model, inputs)) < 1e-5


@pytest.mark.slow  # the shapes of some 1400 arrays are traced
def test_parameter_count_of_the_published_models():
    model = models.abstract({"_class_name": "UNetSpatioTemporalConditionModel"})
    # Those of diffusers' UNetSpatioTemporalConditionModel() with its defaults, which the published folders have.
    assert parameter_count(model) == 1_524_623_082
    assert len(expected_tensors(model)) == 1428


def test_every_parameter_names_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(models.abstract(UNET_SPATIO_TEMPORAL))):
        assert variable.get_value().ndim == len(variable.get_metadata("axes")), path


def test_the_image_may_come_with_the_latents_or_beside_them():
    model, inputs = unet_spatio_temporal(**ONE_LEVEL), unet_spatio_temporal_inputs()
    image = jnp.repeat(inputs.pop("image_latents"), 3, axis=1)
    beside = run(model, {**inputs, "image_latents": image})
    one = run(model, {**inputs, "image_latents": image[:, :1]})
    joined = run(model, {**inputs, "latents": jnp.concatenate([inputs["latents"], image], axis=-1)})
    np.testing.assert_array_equal(beside, joined)
    np.testing.assert_array_equal(one, joined)


@pytest.mark.parametrize(("change", "message"), [
    ({"latents": jnp.zeros((2, 0, 4, 6, 5)), "image_latents": jnp.zeros((2, 0, 4, 6, 3))}, "0 latent frames"),
    ({"image_latents": jnp.zeros((2, 2, 4, 6, 3))}, "image_latents of shape .2, 2, 4, 6, 3. do not fit .*frames"),
    ({"image_latents": jnp.zeros((2, 4, 6, 3))}, "image_latents of shape"),
    ({"image_latents": None}, "8 channels., or 5 and the image's 3 as image_latents"),
    ({"image_latents": jnp.zeros((2, 1, 4, 6, 4))}, "latents of shape .2, 3, 4, 6, 9."),
    ({"latents": jnp.zeros((2, 3, 5, 6, 8)), "image_latents": None}, "latent height 5 is no multiple of 2"),
    ({"added_time_ids": None}, "needs added_time_ids.*motion bucket"),
    ({"added_time_ids": jnp.zeros((2, 2))}, r"added_time_ids of shape \(2, 2\).*batch, 3"),
    ({"context": jnp.zeros((2, 1, 23))}, "embeddings .batch, tokens, 24"),
    ({"context": jnp.zeros((2, 0, 24))}, "a context of shape"),
    ({"timestep": jnp.zeros((2, 72))}, "one a video"),
])  # fmt: skip
def test_wrong_inputs_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.abstract(UNET_SPATIO_TEMPORAL)(**{**unet_spatio_temporal_inputs(), **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"wings": 2}, "fields"),
    ({"transformer_layers_per_block": 2}, "transformer_layers_per_block 2 is not supported.*Stable Video"),
    ({"num_attention_heads": [2]}, r"num_attention_heads is \[2\].*or 2 of them"),
    ({"num_attention_heads": "2"}, "num_attention_heads is '2'"),
    ({"num_attention_heads": [2, 5]}, "5 num_attention_heads do not divide 64"),
    ({"block_out_channels": [16, 32]}, "32 groups of the norms do not divide 16"),
    ({"projection_class_embeddings_input_dim": 20}, "20 is no multiple of addition_time_embed_dim 8"),
    ({"in_channels": 5}, "in_channels 5 leave none for the image"),
    ({"cross_attention_dim": [24, 24]}, r"cross_attention_dim is \[24, 24\]"),
])  # fmt: skip
def test_wrong_configurations_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.parse_config({**UNET_SPATIO_TEMPORAL, **change})


@pytest.mark.parametrize("fields", [{}, ONE_LEVEL])
def test_a_config_survives_the_round_trip(fields):
    config = models.parse_config({**UNET_SPATIO_TEMPORAL, **fields})
    assert models.parse_config(json.loads(json.dumps(config.to_dict()))) == config
