"""The CogVideoX model: parity with diffusers in its variants, folders, quantized products, sizes, parameter counts."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import layer_differences
from flax import nnx
from parity import parity_errors
from round_trip import check_round_trip
from small_models import COGVIDEOX, COGVIDEOX_VARIANTS, cogvideox, cogvideox_inputs

import conversion
import models
import qvdjax
from models.cogvideox_config import CogVideoXConfig
from models.cogvideox_positions import rotary_tables
from qvdjax.errors import UserError

CASES = {
    **{name: (fields, (4 if name.startswith("1.5") else 3, 8, 6)) for name, fields in COGVIDEOX_VARIANTS.items()},
    # Fixed tables are made for any size; rotary ones squeeze a video into the size that the model is made for.
    "2b, other size": ({}, (5, 6, 10)),
    "5b, wider": ({**COGVIDEOX_VARIANTS["5b"], "sample_height": 20, "sample_width": 30}, (4, 6, 14)),
    "5b, higher": ({**COGVIDEOX_VARIANTS["5b"], "sample_height": 20, "sample_width": 30}, (3, 12, 8)),
    "fewer parameters": (
        {"norm_elementwise_affine": False, "attention_bias": False, "patch_bias": False, "norm_eps": 1e-3}, (3, 8, 6),
    ),
}  # fmt: skip

PARITY = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import jax, jax.numpy as jnp, numpy as np, torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
import conversion
import models

def randomise(tensor):
    fan_in = tensor[0].numel() if tensor.ndim > 1 else 0
    tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.5))

@torch.no_grad()
def apply(reference, latents, timestep, context):
    options = {}
    if reference.config.ofs_embed_dim:
        options["ofs"] = torch.tensor([2.0], dtype=torch.float64)
    if reference.config.use_rotary_positional_embeddings:
        pipeline = SimpleNamespace(transformer=reference, vae_scale_factor_spatial=8)
        frames, height, width = latents.shape[1:4]
        options["image_rotary_emb"] = CogVideoXPipeline._prepare_rotary_positional_embeddings(
            pipeline, 8 * height, 8 * width, frames, torch.device("cpu")
        )
    latents = torch.tensor(latents.transpose(0, 1, 4, 2, 3))  # b f h w c -> b f c h w
    return reference(latents, torch.tensor(context), torch.tensor(timestep), **options).sample.numpy()

def error(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

run = jax.jit(lambda model, *inputs: model(*inputs))
torch.manual_seed(0)
random, errors = np.random.default_rng(0), {}
for name, (config, size) in json.loads(sys.argv[1]).items():
    folder = Path(sys.argv[2], name)
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    reference = CogVideoXTransformer3DModel(**fields).double().eval()
    with torch.no_grad():
        for tensor in reference.parameters():
            randomise(tensor)
        if config.get("use_learned_positional_embeddings"):
            randomise(reference.patch_embed.pos_embedding)
    reference.save_pretrained(folder / "theirs")
    model = models.load(folder / "theirs")
    models.save(model, folder / "ours")
    back = CogVideoXTransformer3DModel.from_pretrained(folder / "ours", torch_dtype=torch.float64).eval()
    weights = back.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())

    latents = random.standard_normal((2, *size, config["in_channels"]))
    context = random.standard_normal((2, config["max_text_seq_length"], config["text_embed_dim"]))
    for case, timestep in {"zero": [0.0, 0.0], "ordinary": [999.0, 317.0]}.items():
        timestep = np.asarray(timestep)
        theirs = apply(reference, latents, timestep, context)
        ours = run(model, jnp.asarray(latents), timestep, context)
        assert ours.dtype == jnp.float64
        errors[f"{name}: {case}"] = error(np.asarray(ours).transpose(0, 1, 4, 2, 3), theirs)
    errors[f"{name}: saved by us"] = error(apply(back, latents, timestep, context), theirs)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, float]:
    """Relative L2 errors against diffusers in float64, in a process of its own (JAX's 64 bits are global)."""
    cases = {name: ({**COGVIDEOX, **fields}, size) for name, (fields, size) in CASES.items()}
    return parity_errors(PARITY, cases, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", CASES)
def test_parity_with_diffusers(errors, name):
    # diffusers computes the timestep's sinusoid, rotary tables and rotations in float32 even for float64 models. At
    # timestep 0 the sinusoid is exact and the rest makes up to 2e-8, most of it where rotations are (1e-10 without); at
    # ordinary timesteps the float32 sinusoid of a large argument is off by up to 3e-5.
    assert errors[f"{name}: zero"] <= 1e-7, errors
    assert errors[f"{name}: ordinary"] <= 5e-5, errors
    # The same weights in the same program; torch sums in an order that depends on where arrays lie (float64 rounding).
    assert errors[f"{name}: saved by us"] <= 1e-14, errors


run = jax.jit(lambda model, inputs: model(**inputs))


def relative(one, other) -> float:
    """Relative L2 distance."""
    return float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))


@pytest.mark.parametrize("variant", COGVIDEOX_VARIANTS)
def test_load_is_the_inverse_of_save(tmp_path, variant):
    check_round_trip(cogvideox(variant, dtype=jnp.bfloat16), tmp_path)


@pytest.mark.parametrize("variant", ["5b", "1.5-5b-i2v"])
def test_quantized_models_agree_in_both_executions(tmp_path, variant):
    model, inputs = cogvideox(variant), cogvideox_inputs(variant)
    quantized = qvdjax.quantize(model, "rtn-w8a8")
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    bits = lambda path: (rows[path]["weight_bits"], rows[path]["activation_bits"])  # noqa: E731
    for name in ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
        assert bits(f"transformer_blocks.2.{name}") == (8, 8)
    for name in ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.norm2.linear", "norm_out.linear"):
        assert bits(name) == (8, 32)  # weights only
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    differences = layer_differences(loaded, inputs)
    assert len(differences) > 10
    # int32 sums against float32 sums of the same integers, hundreds of them.
    assert max(differences) < 2e-6
    # Some twenty products in a row, each with errors of some 1e-3 from eight bits a token and channel.
    assert 1e-3 < relative(run(loaded, inputs), run(model, inputs)) < 3e-2


def test_a_calibrated_method_sees_all_conditions():
    model, inputs = cogvideox("1.5-5b-i2v"), cogvideox_inputs("1.5-5b-i2v")
    latents, image_latents = jnp.split(inputs["latents"], 2, axis=-1)
    batch = {**inputs, "latents": latents, "image_latents": image_latents, "ofs": jnp.asarray([2.0])}
    quantized = qvdjax.quantize(model, "smoothquant-w8a8", [batch])
    # As above: random weights have no outliers that smoothing could take away.
    assert 1e-3 < relative(run(quantized, inputs), run(model, inputs)) < 3e-2


def test_a_quantized_folder_is_exported(tmp_path):
    # Diffusers' names need no table, and the two formats know no family: that this one gets there is all to see.
    quantized = qvdjax.quantize(cogvideox("1.5-5b-i2v"), "rtn-w4a8")
    models.save(quantized, tmp_path / "model")
    conversion.export(tmp_path / "model", tmp_path / "plain", "diffusers")
    plain = models.load(tmp_path / "plain").stacks[0].block
    codes = quantized.stacks[0].block.ff.net["2"].qweight
    assert (plain.ff.net["2"].weight[...] == codes.dequantize()).all()
    report = conversion.export(tmp_path / "model", tmp_path / "packed", "compressed-tensors")
    assert report["dequantized"] == []
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    targets = [name for group in config["config_groups"].values() for name in group["targets"]]
    # In each of three blocks four layers of attention, two of the feed-forward, two of modulation; one at the head.
    assert len(targets) == 3 * 8 + 1
    assert "patch_embed.proj" in config["ignore"]


def test_products_of_attention_are_quantized_alike_in_both_executions():
    model, inputs = cogvideox(num_layers=1), cogvideox_inputs()
    recipe = qvdjax.recipes.get("rtn-w8a8", attention_qk_bits=8, attention_pv_bits=8)
    quantized = qvdjax.quantize(model, recipe, execution="integer")
    differences = layer_differences(quantized, inputs)
    assert len(differences) == sum(row["activation_bits"] == 8 for row in qvdjax.describe(quantized))
    # As above; a probability that float32 rounding moves to the next code is one of hundreds that are averaged.
    assert max(differences) < 1e-3


@pytest.mark.parametrize("variant", ["5b-i2v", "1.5-5b-i2v"])
def test_image_latents_are_the_last_channels(variant):
    model, inputs = cogvideox(variant), cogvideox_inputs(variant)
    noise, image = jnp.split(inputs["latents"], 2, axis=-1)
    out = run(model, inputs)
    assert out.shape == noise.shape
    # The same operations on equal numbers, of which one program joins two parts: float32 rounding at most.
    assert relative(run(model, {**inputs, "latents": noise, "image_latents": image}), out) < 1e-5
    assert relative(run(model, {**inputs, "latents": noise, "image_latents": image[:, ::-1]}), out) > 1e-2


def test_ofs_is_two_unless_it_is_given():
    model, inputs = cogvideox("1.5-5b-i2v"), cogvideox_inputs("1.5-5b-i2v")
    out = run(model, inputs)
    # The same numbers, one of them known to the compiler or not: float32 rounding through three blocks.
    assert relative(run(model, {**inputs, "ofs": jnp.asarray([2.0])}), out) < 1e-5
    mixed = run(model, {**inputs, "ofs": jnp.asarray([2.0, 0.5])})
    assert relative(mixed[0], out[0]) < 1e-5
    assert relative(mixed[1], out[1]) > 1e-2


def test_positions_are_those_of_diffusers_at_the_published_sizes():
    # The rotary table of 480 x 720, where squeezing changes nothing, and one of 11 x 48 x 85 patches; last video token.
    for config, latents in (
        ({"attention_head_dim": 64}, (13, 60, 90)),
        ({"attention_head_dim": 64, "patch_size_t": 2, "sample_height": 300, "sample_width": 300}, (22, 96, 170)),
    ):
        config = CogVideoXConfig(use_rotary_positional_embeddings=True, **config)
        frames, rows, columns = config.grid(latents)
        cosines, sines = rotary_tables(config, (frames, rows, columns), text=226)
        assert cosines.shape == sines.shape == (226 + frames * rows * columns, 32)
        assert (cosines[:226] == 1).all()
        assert (sines[:226] == 0).all()
        angles = np.concatenate([(frames - 1) / 10000 ** (np.arange(8) / 8)] + [
            (n - 1) / 10000 ** (np.arange(12) / 12) for n in (rows, columns)
        ])  # fmt: skip
        np.testing.assert_allclose(cosines[-1], np.cos(angles), atol=1e-12)  # float64 rounding of angles up to 84
        np.testing.assert_allclose(sines[-1], np.sin(angles), atol=1e-12)


PUBLISHED_5B = {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True}
PUBLISHED_15 = {**PUBLISHED_5B, "patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}


@pytest.mark.parametrize(("fields", "count"), [
    ({}, 1_693_783_872),
    (PUBLISHED_5B, 5_570_283_072),
    # and the table, which PyTorch keeps as a buffer
    ({**PUBLISHED_5B, "in_channels": 32, "use_learned_positional_embeddings": True}, 5_570_479_680 + 17_776 * 3072),
    (PUBLISHED_15, 5_570_676_352),
    ({**PUBLISHED_15, "in_channels": 32, "ofs_embed_dim": 512}, 5_571_594_880),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(fields, count):
    model = models.abstract({"_class_name": "CogVideoXTransformer3DModel", **fields})
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize("variant", COGVIDEOX_VARIANTS)
def test_every_parameter_names_its_axes(variant):
    model = models.abstract({**COGVIDEOX, **COGVIDEOX_VARIANTS[variant]})
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        array, axes = variable.get_value(), variable.get_metadata("axes")
        leading = 1 if path[0] == "stacks" else 0
        assert array.ndim == leading + len(axes), path


def test_remat_changes_neither_value_nor_gradient():
    model, inputs = cogvideox(), cogvideox_inputs()
    loss = lambda m, remat: (m(**inputs, remat=remat) ** 2).mean()  # noqa: E731
    plain, remat = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(model, r) for r in (False, True))
    # Recomputation fuses differently: float32 rounding.
    chex.assert_trees_all_close(jax.tree.leaves(plain), jax.tree.leaves(remat), rtol=1e-3, atol=1e-5)


def test_bfloat16_keeps_its_float32_islands(tmp_path):
    inputs, model = cogvideox_inputs(), cogvideox()
    models.save(model, tmp_path / "model")
    narrow = models.load(tmp_path / "model", dtype="bfloat16")
    block = narrow.stacks[0].block
    islands = (block.norm1.norm.weight, block.attn1.norm_q.bias, narrow.time_embedding.linear_1.weight)
    assert all(variable[...].dtype == jnp.float32 for variable in islands)
    assert block.norm1.linear.weight[...].dtype == jnp.bfloat16
    out, exact = run(narrow, inputs), run(model, inputs)
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; three blocks of some ten roundings each.
    assert relative(out, exact) < 0.05


@pytest.mark.parametrize(("variant", "change", "message"), [
    ("5b", {"latents": jnp.zeros((2, 3, 7, 6, 5))}, "latent height 7 is no multiple of the patch 2"),
    ("5b", {"latents": jnp.zeros((2, 3, 8, 9, 5))}, "latent width 9 is no multiple of the patch 2"),
    ("5b", {"latents": jnp.zeros((2, 3, 8, 6, 4))}, "5 channels"),
    ("5b", {"latents": jnp.zeros((2, 0, 8, 6, 5))}, "latent frames 0"),
    ("5b", {"context": jnp.zeros((2, 7, 23))}, "24"),
    ("5b", {"ofs": jnp.ones(2)}, "takes no ofs"),
    ("2b", {"context": jnp.zeros((2, 8, 24))}, "8 text tokens are more than the 7"),
    ("1.5-5b", {"latents": jnp.zeros((2, 3, 8, 6, 5))}, "frames 3 is no multiple .* add frames in front"),
    ("1.5-5b", {"latents": jnp.zeros((2, 4, 8, 20, 5))}, "8 x 20 are more than .* at most 16 x 18"),
    ("5b-i2v", {"latents": jnp.zeros((2, 3, 8, 6, 5))}, "of which 5 may come as image_latents"),
    ("5b-i2v", {"image_latents": jnp.zeros((2, 1, 8, 6, 5))}, "image_latents of shape"),
    ("5b-i2v", {"latents": jnp.zeros((2, 3, 8, 8, 10))}, "3 x 8 x 8 do not fit the learned .* 3 x 8 x 6"),
    ("5b-i2v", {"latents": jnp.zeros((2, 2, 8, 6, 10))}, "2 x 8 x 6 do not fit the learned"),
    ("5b-i2v", {"context": jnp.zeros((2, 8, 24))}, "8 text tokens are more than the 7"),
])  # fmt: skip
def test_wrong_sizes_are_said(variant, change, message):
    with pytest.raises(UserError, match=message):
        models.abstract({**COGVIDEOX, **COGVIDEOX_VARIANTS[variant]})(**{**cogvideox_inputs(variant), **change})


@pytest.mark.parametrize(("change", "message"), [
    ({"wings": 2}, "fields"),
    ({"num_layers": 0}, "positive integer"),
    ({"freq_shift": 1}, "freq_shift 1 is not supported"),
    ({"freq_shift": False}, "freq_shift is False"),
    ({"dropout": 0.1}, "dropout 0.1 is not supported"),
    ({"flip_sin_to_cos": False}, "flip_sin_to_cos"),
    ({"activation_fn": "geglu"}, "activation_fn 'geglu'"),
    ({"timestep_activation_fn": "gelu"}, "timestep_activation_fn"),
    ({"patch_size_t": "2"}, "patch_size_t is '2'"),
    ({"patch_size_t": 2}, "no patches of 2 frames"),
    ({"use_learned_positional_embeddings": True}, "without rotary"),
    ({"attention_head_dim": 24, "use_rotary_positional_embeddings": True}, "attention_head_dim 24 is no multiple"),
    ({"attention_head_dim": 12}, "width 24 is no multiple"),
    ({"ofs_embed_dim": 512}, "ofs_embed_dim 512 is not time_embed_dim 20"),
    ({"sample_height": 1}, "less than a patch"),
    ({"in_channels": 4}, "4 channels become 5"),
    ({**COGVIDEOX_VARIANTS["5b-i2v"], "sample_frames": 8}, "no whole number of latent frames"),
    ({**COGVIDEOX_VARIANTS["5b-i2v"], "sample_width": 2**20, "sample_height": 2**20}, "tokens; check sample_height"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0"),
])  # fmt: skip
def test_wrong_configurations_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.parse_config({**COGVIDEOX, **change})


@pytest.mark.parametrize("variant", COGVIDEOX_VARIANTS)
def test_a_config_survives_the_round_trip(variant):
    config = models.parse_config({**COGVIDEOX, **COGVIDEOX_VARIANTS[variant]})
    assert models.parse_config(config.to_dict()) == config
    assert sum(config.rope_widths) == config.attention_head_dim
    images = {"image_latents": (*config.least_size, 5)} if variant.endswith("i2v") else {}
    assert (config.latent_channels, config.conditions) == (5, images)
