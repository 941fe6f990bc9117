"""ModelScope's video UNet: parity with diffusers, folders, quantized products, tables, sizes, counts."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import layer_differences
from flax import nnx
from round_trip import check_round_trip
from small_models import UNET_3D, unet_3d, unet_inputs
from unet_parity import unet_errors

import models
import qvdjax
from qvdjax.checkpoint.variables import expected_tensors, parameter_count
from qvdjax.errors import UserError

CASES = {
    # A head's features divide every level's; the first transformer's inside is wider than the stream.
    "two levels": ({"norm_eps": 1e-3}, (3, 4, 6)),
    "three levels": (
        {
            "block_out_channels": [16, 24, 32], "layers_per_block": 2, "attention_head_dim": 8,
            "down_block_types": ["CrossAttnDownBlock3D", "CrossAttnDownBlock3D", "DownBlock3D"],
            "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D", "CrossAttnUpBlock3D"],
        }, (5, 8, 12),
    ),
}  # fmt: skip


@functools.cache
def errors(name: str) -> dict[str, float]:
    fields, size = CASES[name]
    case = {
        "config": {**UNET_3D, **fields}, "size": size, "tokens": 7, "conditions": {}, "zero": {},
        "ordinary": {"timestep": [999.0, 317.0]},
    }  # fmt: skip
    return unet_errors({name: case})


@pytest.mark.parametrize("name", ["two levels", pytest.param("three levels", marks=pytest.mark.slow)])
def test_parity_with_diffusers(name):
    found = errors(name)
    # diffusers computes the timestep's sinusoid in float32: exact at timestep 0, where float64 rounding is left, and
    # off by up to 3e-5 at ordinary timesteps, of which the time embedding's two layers leave a part.
    assert found[f"{name}: zero"] <= 1e-6, found
    assert found[f"{name}: ordinary"] <= 1e-5, found
    # The same weights in the same program; torch sums in an order that depends on where arrays lie (float64 rounding).
    assert found[f"{name}: saved by us"] <= 1e-13, found


# One level: down, middle, up twice. Compiling is what these tests cost, so the compiler takes no trouble.
ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlock3D"], "up_block_types": ["CrossAttnUpBlock3D"],
}  # fmt: skip
run = jax.jit(lambda model, inputs: model(**inputs), compiler_options={"xla_backend_optimization_level": 0})


def relative(one, other) -> float:
    """Relative L2 distance."""
    return float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))


def test_load_is_the_inverse_of_save(tmp_path):
    check_round_trip(unet_3d(dtype=jnp.bfloat16), tmp_path)


@pytest.mark.slow
def test_quantized_models_agree_in_both_executions(tmp_path):
    model, inputs = unet_3d(**ONE_LEVEL), unet_inputs()
    quantized = qvdjax.quantize(model, "rtn-w8a8")
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    bits = lambda path: (rows[path]["weight_bits"], rows[path]["activation_bits"])  # noqa: E731
    for name in (
        "transformer_in.proj_in", "transformer_in.transformer_blocks.0.attn1.to_q", "transformer_in.proj_out",
        "down_blocks.0.resnets.0.conv1", "down_blocks.0.temp_convs.0.conv1.2", "down_blocks.0.temp_convs.0.conv4.3",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "mid_block.temp_convs.1.conv2.3",
        "mid_block.temp_attentions.0.transformer_blocks.0.ff.net.0.proj", "up_blocks.0.resnets.1.conv_shortcut",
    ):  # fmt: skip
        assert bits(name) == (8, 8), name
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert bits(name) == (32, 32), name
    assert bits("mid_block.resnets.1.time_emb_proj") == (8, 32)  # weights only
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    differences = layer_differences(loaded, inputs)
    assert len(differences) > 40
    # int32 sums against float32 sums of the same integers, up to 600 of them.
    assert max(differences) < 2e-6
    error = relative(run(loaded, inputs), run(model, inputs))
    # Some hundred products in a row, each with errors of some 1e-3 to 1e-2 from eight bits.
    assert 1e-3 < error < 2e-1


def test_layers_of_the_timestep_become_tables():
    model, inputs = unet_3d(**ONE_LEVEL), unet_inputs()
    tabulated = qvdjax.tabulate(model, [999.0, 317.0, 1.0])
    tables = {row["path"] for row in qvdjax.describe(tabulated) if row["execution"] == "table"}
    resnets = ("down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1", "up_blocks.0.resnets.0",
               "up_blocks.0.resnets.1")  # fmt: skip
    assert tables == {
        "time_embedding.linear_1", "time_embedding.linear_2", *(f"{name}.time_emb_proj" for name in resnets),
    }  # fmt: skip
    # The same products in another program: float32 rounding through five blocks.
    assert relative(run(tabulated, inputs), run(model, inputs)) < 1e-5


@pytest.mark.slow  # the shapes of some 1400 arrays are traced
def test_parameter_count_of_the_published_model():
    model = models.abstract({"_class_name": "UNet3DConditionModel"})
    # Those of diffusers' UNet3DConditionModel() with its defaults, which the published folder has.
    assert parameter_count(model) == 1_411_233_860
    assert len(expected_tensors(model)) == 1480


def test_the_first_transformer_opens_the_first_skip_connection():
    model = models.abstract(UNET_3D)
    prefixes = [stack.prefix for stack in model.stacks]
    assert prefixes == ["transformer_in", "down_blocks.0", "down_blocks.1", "mid_block", *["up_blocks.0"] * 2,
                        *["up_blocks.1"] * 2]  # fmt: skip
    stream, conditioning = jax.eval_shape(lambda m, i: m.embed(**i), model, unet_inputs())
    opened = [len(stream.skips)]
    for stack in model.stacks:
        stream, _ = jax.eval_shape(lambda s, x, c: s(x, c), stack, stream, conditioning)
        opened.append(len(stream.skips))
    assert opened == [0, 1, 3, 4, 4, 3, 2, 1, 0]
    assert stream.sample.shape == (2, 3, 4, 6, 16)


def test_every_parameter_names_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(models.abstract(UNET_3D))):
        assert variable.get_value().ndim == len(variable.get_metadata("axes")), path


@pytest.mark.parametrize(("change", "message"), [
    ({"latents": jnp.zeros((2, 0, 4, 6, 5))}, "0 latent frames"),
    ({"latents": jnp.zeros((2, 3, 5, 6, 5))}, "latent height 5 is no multiple of 2; it is halved 1 times"),
    ({"latents": jnp.zeros((2, 3, 4, 6, 4))}, "5 channels"),
    ({"timestep": jnp.zeros((2, 72))}, "one a video"),
    ({"context": jnp.zeros((2, 7, 23))}, "text embeddings .batch, tokens, 24"),
])  # fmt: skip
def test_wrong_inputs_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.abstract(UNET_3D)(**{**unet_inputs(), **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"wings": 2}, "fields"),
    ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported.*ModelScope"),
    ({"num_attention_heads": 8}, "num_attention_heads 8 is not supported"),
    ({"attention_head_dim": [4, 8]}, r"attention_head_dim is \[4, 8\]"),
    ({"attention_head_dim": 5}, "attention_head_dim 5 does not divide 16"),
    ({"norm_num_groups": None}, "norm_num_groups is None"),
    ({"block_out_channels": [16]}, "down_block_types has 2 entries, block_out_channels 1"),
    ({"up_block_types": ["UpBlock3D", "UpBlockMotion"]}, "up_block_types has 'UpBlockMotion'"),
])  # fmt: skip
def test_wrong_configurations_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.parse_config({**UNET_3D, **change})


def test_a_config_survives_the_round_trip():
    config = models.parse_config(UNET_3D)
    assert json.loads(json.dumps(config.to_dict())).items() >= UNET_3D.items()
    assert models.parse_config(config.to_dict()) == config


def test_frames_are_mixed_by_convolutions_and_transformers_alone():
    # Without what mixes frames, a video is its frames one by one.
    model, inputs = unet_3d(**ONE_LEVEL), unet_inputs()

    def still(variable):
        return variable.replace(jnp.zeros_like(variable.get_value()))

    graph, state = nnx.split(model)
    flat = [
        (path, still(v) if {"conv4", "temp_attentions", "transformer_in"} & set(path) or _opens(path) else v)
        for path, v in nnx.to_flat_state(state)
    ]
    model = nnx.merge(graph, nnx.from_flat_state(flat))
    frames = [run(model, {**inputs, "latents": inputs["latents"][:, i : i + 1]}) for i in range(3)]
    np.testing.assert_allclose(run(model, inputs), jnp.concatenate(frames, axis=1), rtol=1e-4, atol=1e-4)  # float32


def _opens(path) -> bool:
    return path[:2] == ("stacks", 0)
