"""The HunyuanVideo model: parity with diffusers, text masks, folders, quantized products, sizes, parameter counts."""

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
from small_models import HUNYUANVIDEO, hunyuanvideo, hunyuanvideo_inputs

import conversion
import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.parallel import make_mesh, place

CASES = {
    "usual": ({}, (3, 8, 6)),
    # Patches of two frames, other widths in and out, no guidance, blocks and heads in other numbers.
    "other": (
        {
            "patch_size_t": 2, "patch_size": 1, "in_channels": 3, "out_channels": 6, "guidance_embeds": False,
            "num_layers": 1, "num_single_layers": 3, "num_refiner_layers": 1, "num_attention_heads": 3,
            "mlp_ratio": 2.5, "rope_theta": 100.0, "rope_axes_dim": [16, 12, 4],
        },
        (6, 3, 4),
    ),
}  # fmt: skip

PARITY = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, torch
from diffusers import HunyuanVideoTransformer3DModel
import models

@torch.no_grad()
def apply(reference, inputs):
    inputs = {name: torch.tensor(array) for name, array in inputs.items()}
    inputs["hidden_states"] = inputs.pop("latents").permute(0, 4, 1, 2, 3)  # b f h w c -> b c f h w
    inputs["encoder_hidden_states"] = inputs.pop("context")
    return reference(**inputs).sample.permute(0, 2, 3, 4, 1).numpy()

def error(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

run = jax.jit(lambda model, inputs: model(**inputs))
torch.manual_seed(0)
random, errors = np.random.default_rng(0), {}
for name, (config, size) in json.loads(sys.argv[1]).items():
    folder = Path(sys.argv[2], name)
    fields = {k: v for k, v in config.items() if not k.startswith("_")}
    reference = HunyuanVideoTransformer3DModel(**fields).double().eval()
    with torch.no_grad():
        for tensor in reference.parameters():
            spread = 1.5 / tensor[0].numel() ** 0.5 if tensor.ndim > 1 else 0.5
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * spread)
    reference.save_pretrained(folder / "theirs")
    model = models.load(folder / "theirs")
    models.save(model, folder / "ours")
    back = HunyuanVideoTransformer3DModel.from_pretrained(folder / "ours", torch_dtype=torch.float64).eval()
    weights = back.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())

    inputs = {
        "latents": random.standard_normal((3, *size, config["in_channels"])),
        "context": random.standard_normal((3, 7, config["text_embed_dim"])),
        "encoder_attention_mask": np.arange(7) < np.array([[4], [7], [1]]),
        "pooled_projections": random.standard_normal((3, config["pooled_projection_dim"])),
    }
    cases = {"zero": ([0.0] * 3, [0.0] * 3), "ordinary": ([999.0, 317.0, 4.0], [6000.0, 1000.0, 3500.0])}
    for case, (timestep, guidance) in cases.items():
        inputs["timestep"] = np.asarray(timestep)
        if config.get("guidance_embeds", True):
            inputs["guidance"] = np.asarray(guidance)
        theirs = apply(reference, inputs)
        ours = run(model, inputs)
        assert ours.dtype == jnp.float64
        errors[f"{name}: {case}"] = error(np.asarray(ours), theirs)
    errors[f"{name}: saved by us"] = error(apply(back, inputs), theirs)
print(json.dumps(errors))
"""


@pytest.fixture(scope="module")
def errors(tmp_path_factory) -> dict[str, float]:
    """Relative L2 errors against diffusers in float64, in a process of its own (JAX's 64 bits are global)."""
    cases = {name: ({**HUNYUANVIDEO, **fields}, size) for name, (fields, size) in CASES.items()}
    return parity_errors(PARITY, cases, tmp_path_factory.mktemp("parity"))


@pytest.mark.parametrize("name", CASES)
def test_parity_with_diffusers(errors, name):
    # diffusers computes sinusoids, rotary tables and the mean squares of RMSNorm in float32 even for float64 models. At
    # timestep and guidance 0 the sinusoids are exact, and the rest makes 4e-9; at ordinary ones the float32 sinusoid of
    # an argument of up to 6000 is off by up to 4e-4, of which 2e-5 gets through.
    assert errors[f"{name}: zero"] <= 1e-7, errors
    assert errors[f"{name}: ordinary"] <= 2e-4, errors
    # The same weights in the same program; torch sums in an order that depends on where arrays lie (float64 rounding).
    assert errors[f"{name}: saved by us"] <= 1e-14, errors


run = jax.jit(lambda model, inputs: model(**inputs))


def relative(one, other) -> float:
    """Relative L2 distance."""
    return float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))


@pytest.fixture(scope="module")
def model():
    return hunyuanvideo()


@pytest.fixture(scope="module")
def shallow():
    """One block of each kind: fewer roundings in a row, and with these inputs none that flips a code."""
    return hunyuanvideo(num_layers=1, num_single_layers=1, num_refiner_layers=1)


@pytest.fixture(scope="module")
def quantized(shallow):
    """At 8 bits, products of attention too, in integer execution."""
    recipe = qvdjax.recipes.get("rtn-w8a8", attention_qk_bits=8, attention_pv_bits=8)
    return qvdjax.quantize(shallow, recipe, execution="integer")


@pytest.mark.parametrize("kind", ["model", "quantized"])
def test_padding_and_other_samples_influence_nothing(request, kind):
    model, inputs = request.getfixturevalue(kind), hunyuanvideo_inputs()
    out = run(model, inputs)
    # What stands in the padding of the first text, of four tokens, is multiplied by 0 or left out: not a bit changes.
    changed = inputs["context"].at[0, 4:].set(100.0)
    assert (run(model, {**inputs, "context": changed}) == out).all()
    changed = inputs["context"].at[0, 3].add(1.0)
    assert relative(run(model, {**inputs, "context": changed})[0], out[0]) > 1e-3
    longer = {**inputs, "encoder_attention_mask": inputs["encoder_attention_mask"].at[0, 4].set(True)}
    assert relative(run(model, longer)[0], out[0]) > 1e-3
    assert (run(model, longer)[1] == out[1]).all()


def test_masks_are_flags_or_numbers_and_may_be_left_out(model):
    inputs = hunyuanvideo_inputs()
    out = run(model, inputs)
    mask = inputs.pop("encoder_attention_mask")
    assert (run(model, {**inputs, "encoder_attention_mask": mask.astype(jnp.float32)}) == out).all()
    full = run(model, {**inputs, "encoder_attention_mask": jnp.ones((2, 7), bool)})
    # The second text has all seven tokens. The same operations, one program knowing the lengths: float32 rounding.
    assert relative(run(model, inputs), full) < 1e-5
    assert relative(full[1], out[1]) < 1e-5
    nothing = run(model, {**inputs, "encoder_attention_mask": jnp.zeros((2, 7), bool)})
    assert bool(jnp.isfinite(nothing).all())


@pytest.mark.parametrize("name", ["guidance", "pooled_projections", "timestep", "context"])
def test_every_condition_counts_for_its_own_sample(model, name):
    inputs = hunyuanvideo_inputs()
    out = run(model, inputs)
    moved = run(model, {**inputs, name: inputs[name].at[0].multiply(0.5)})
    assert relative(moved[0], out[0]) > 1e-3
    assert (moved[1] == out[1]).all()


def test_quantized_models_agree_in_both_executions(tmp_path, model, shallow):
    inputs = hunyuanvideo_inputs()
    quantized = qvdjax.quantize(model, "rtn-w8a8")
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    bits = lambda path: (rows[path]["weight_bits"], rows[path]["activation_bits"])  # noqa: E731
    attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    for name in (*(f"attn.{layer}" for layer in attention), "ff.net.0.proj", "ff.net.2", "ff_context.net.2"):
        assert bits(f"transformer_blocks.1.{name}") == (8, 8)
    for name in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out"):
        assert bits(f"single_transformer_blocks.0.{name}") == (8, 8)
    for name in ("attn.to_k", "attn.to_out.0", "ff.net.0.proj"):
        assert bits(f"context_embedder.token_refiner.refiner_blocks.1.{name}") == (8, 8)
    modulation = ("transformer_blocks.0.norm1", "single_transformer_blocks.1.norm", "norm_out")
    for name in (*modulation, "context_embedder.token_refiner.refiner_blocks.0.norm_out"):
        assert bits(f"{name}.linear") == (8, 32)  # weights only
    models.save(qvdjax.quantize(shallow, "rtn-w8a8"), tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    differences = layer_differences(loaded, inputs)
    assert len(differences) > 20
    # int32 sums against float32 sums of the same integers, hundreds of them.
    assert max(differences) < 2e-6
    # Some fifteen products in a row, each with errors of some 1e-3 to 1e-2 from eight bits a token and channel.
    assert 1e-3 < relative(run(loaded, inputs), run(shallow, inputs)) < 6e-2


def test_products_of_attention_are_quantized_alike_in_both_executions(quantized):
    differences = layer_differences(quantized, hunyuanvideo_inputs())
    assert len(differences) == sum(row["activation_bits"] == 8 for row in qvdjax.describe(quantized))
    # As above; a probability that float32 rounding moves to the next code is one of hundreds that are averaged.
    assert max(differences) < 1e-3


def test_a_calibrated_method_sees_all_conditions(model):
    inputs = hunyuanvideo_inputs()
    quantized = qvdjax.quantize(model, "smoothquant-w8a8", [inputs])
    # As above: random weights have no outliers that smoothing could take away.
    assert 1e-3 < relative(run(quantized, inputs), run(model, inputs)) < 6e-2


def test_tables_are_made_of_the_layers_that_see_the_timestep_alone(model):
    inputs = hunyuanvideo_inputs()
    tabulated = qvdjax.tabulate(model, [317.0, 999.0])
    tables = {row["path"] for row in qvdjax.describe(tabulated) if row["execution"] == "table"}
    assert tables == {
        f"{where}time_text_embed.timestep_embedder.linear_{n}" for where in ("", "context_embedder.") for n in (1, 2)
    }
    # The same numbers, computed in another program: float32 rounding.
    assert relative(run(tabulated, inputs), run(model, inputs)) < 1e-4


def test_load_is_the_inverse_of_save(tmp_path):
    check_round_trip(hunyuanvideo(dtype=jnp.bfloat16), tmp_path)


def test_a_quantized_folder_is_exported(tmp_path, model):
    quantized = qvdjax.quantize(model, "rtn-w4a8")
    models.save(quantized, tmp_path / "model")
    conversion.export(tmp_path / "model", tmp_path / "plain", "diffusers")
    plain = models.load(tmp_path / "plain").stacks[1].block
    assert (plain.proj_out.weight[...] == quantized.stacks[1].block.proj_out.qweight.dequantize()).all()
    report = conversion.export(tmp_path / "model", tmp_path / "packed", "compressed-tensors")
    assert report["dequantized"] == []


@pytest.mark.slow
def test_eight_devices_compute_what_one_does(model):
    inputs = hunyuanvideo_inputs()
    alone = run(model, inputs)
    for sizes in ({"data": 2, "context": 2, "tensor": 2}, {"fsdp": 4, "context": 2}):
        mesh = make_mesh(sizes)
        with jax.set_mesh(mesh):
            spread = run(place(model, mesh), inputs)
        # Sums in another order: float32 rounding through four blocks.
        assert relative(jnp.asarray(np.asarray(spread)), alone) < 1e-4


@pytest.mark.parametrize(("fields", "count"), [
    ({}, 12_821_012_544),
    # Without the guidance's two layers, 256 and 3072 wide.
    ({"guidance_embeds": False}, 12_821_012_544 - (256 + 1) * 3072 - (3072 + 1) * 3072),
])  # fmt: skip
def test_parameter_counts_of_the_published_model(fields, count):
    model = models.abstract({"_class_name": "HunyuanVideoTransformer3DModel", **fields})
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


def test_every_parameter_names_its_axes():
    for path, variable in nnx.to_flat_state(nnx.state(models.abstract(HUNYUANVIDEO))):
        array, axes = variable.get_value(), variable.get_metadata("axes")
        assert array.ndim == (path[0] == "stacks") + len(axes), path


def test_remat_changes_neither_value_nor_gradient(shallow):
    inputs = hunyuanvideo_inputs()
    loss = lambda m, remat: (m(**inputs, remat=remat) ** 2).mean()  # noqa: E731
    plain, remat = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(shallow, r) for r in (False, True))
    # Recomputation fuses differently: float32 rounding.
    chex.assert_trees_all_close(jax.tree.leaves(plain), jax.tree.leaves(remat), rtol=1e-3, atol=1e-5)


def test_bfloat16_keeps_its_float32_islands(tmp_path, model):
    inputs = hunyuanvideo_inputs()
    models.save(model, tmp_path / "model")
    narrow = models.load(tmp_path / "model", dtype="bfloat16")
    embed, refiner = narrow.time_text_embed, narrow.context_embedder
    islands = (
        embed.timestep_embedder.linear_1, embed.guidance_embedder.linear_2,
        refiner.time_text_embed.timestep_embedder.linear_2, refiner.token_refiner["refiner_blocks"]["0"].norm1,
    )  # fmt: skip
    assert all(layer.weight[...].dtype == jnp.float32 for layer in islands)
    assert narrow.stacks[0].block.norm1.linear.weight[...].dtype == jnp.bfloat16
    out = run(narrow, inputs)
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; six blocks of some ten roundings each.
    assert relative(out, run(model, inputs)) < 0.08


@pytest.mark.parametrize(("change", "message"), [
    ({"latents": jnp.zeros((2, 3, 7, 6, 5))}, "latent height 7 is no multiple of the patch 2"),
    ({"latents": jnp.zeros((2, 3, 8, 9, 5))}, "latent width 9 is no multiple of the patch 2"),
    ({"latents": jnp.zeros((2, 3, 8, 6, 4))}, "5 channels"),
    ({"latents": jnp.zeros((2, 0, 8, 6, 5))}, "latent frames 0"),
    ({"context": jnp.zeros((2, 7, 23))}, "24"),
    ({"context": jnp.zeros((2, 0, 24))}, "context of shape"),
    ({"timestep": jnp.zeros((2, 36))}, "timestep of shape .* one a video"),
    ({"encoder_attention_mask": jnp.ones((2, 8))}, "encoder_attention_mask of shape .*true for tokens of the text"),
    ({"pooled_projections": None}, r"lacks pooled_projections.*\(2, 12\)"),
    ({"pooled_projections": jnp.zeros((1, 12))}, "has, of shape .1, 12., pooled_projections"),
    ({"guidance": None}, "lacks guidance"),
])  # fmt: skip
def test_wrong_inputs_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.abstract(HUNYUANVIDEO)(**{**hunyuanvideo_inputs(), **change})


def test_guidance_is_refused_where_a_model_has_none():
    with pytest.raises(UserError, match="takes no guidance"):
        models.abstract({**HUNYUANVIDEO, "guidance_embeds": False})(**hunyuanvideo_inputs())


@pytest.mark.parametrize(("change", "message"), [
    ({"wings": 2}, "fields"),
    ({"num_single_layers": 0}, "num_single_layers is 0; it must be a positive integer of at most 1000"),
    ({"num_refiner_layers": 5000}, "at most 1000"),
    ({"image_condition_type": "token_replace"}, "image-to-video .*token_replace"),
    ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm'"),
    ({"rope_axes_dim": [8, 10, 16]}, "does not share out the 32 features"),
    ({"rope_axes_dim": [9, 9, 14]}, "does not share out the 32 features"),
    ({"rope_axes_dim": [16, 16]}, "3 positive integers"),
    ({"mlp_ratio": 0.01}, "leaves no features"),
    ({"mlp_ratio": 0.0}, "mlp_ratio is 0.0"),
    ({"guidance_embeds": 1}, "true or false"),
])  # fmt: skip
def test_wrong_configurations_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.parse_config({**HUNYUANVIDEO, **change})


def test_a_config_survives_the_round_trip():
    config = models.parse_config(HUNYUANVIDEO)
    assert models.parse_config(json.loads(json.dumps(config.to_dict()))) == config
