"""The video UNet of AnimateDiff: parity with diffusers, folders, quantized products, tables, sizes, counts."""

import functools
import json
import tempfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from executions import layer_differences
from flax import nnx
from parity import parity_errors
from round_trip import check_round_trip
from small_models import UNET, unet, unet_inputs

import conversion
import models
import qvdjax
from models.unet_additions import middle_shape, reference_widths, skip_shapes
from models.unet_motion_config import check_inputs
from models.unet_transformers import PositionTable
from qvdjax.checkpoint.variables import expected_tensors, parameter_count
from qvdjax.errors import UserError

# Three levels of two layers each: every kind of block that there is, and skip connections of every origin.
_THREE = {
    "block_out_channels": [16, 24, 32], "layers_per_block": 2, "out_channels": 3,
    "down_block_types": ["CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"],
    "up_block_types": ["UpBlockMotion", "CrossAttnUpBlockMotion", "CrossAttnUpBlockMotion"],
}  # fmt: skip
CASES = {
    "v2": (_THREE, (3, 8, 12)),
    "v3": ({"use_motion_mid_block": False, "out_channels": 3}, (5, 4, 6)),
    "v1 as the original has it": (
        {"use_motion_mid_block": False, "resnet_group_norm": "joint", "motion_group_norm": "per_frame"}, (3, 4, 6),
    ),
    "MagicAnimate": (
        {
            "use_motion_mid_block": False, "resnet_group_norm": "joint", "motion_group_norm": "per_frame",
            "_networks_beside": True,
        },
        (3, 4, 6),
    ),
    "linear projections": (
        {"use_linear_projection": True, "norm_eps": 1e-3, "motion_num_attention_heads": 2}, (4, 6, 2),
    ),
}  # fmt: skip

PARITY = """
import json, sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, torch
from diffusers import UNetMotionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets.unet_motion_model import AnimateDiffTransformer3D
import models
from models.unet_additions import middle_shape, reference_widths, skip_shapes

OURS = ("resnet_group_norm", "motion_group_norm")

def per_frame(norm):
    # AnimateDiffTransformer3D hands (batch, channels, frames, height, width) to its norm.
    whole = type(norm).forward
    norm.forward = lambda x: whole(norm, x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)

def joint(norm, frames):
    whole = type(norm).forward
    norm.forward = lambda x: whole(norm, x.unflatten(0, (-1, frames)).transpose(1, 2)).transpose(1, 2).flatten(0, 1)

def place_norms(reference, config, frames):
    for module in reference.modules():
        if isinstance(module, AnimateDiffTransformer3D) and config.get("motion_group_norm") == "per_frame":
            per_frame(module.norm)
        if isinstance(module, ResnetBlock2D) and config.get("resnet_group_norm") == "joint":
            joint(module.norm1, frames), joint(module.norm2, frames)
    if config.get("resnet_group_norm") == "joint":
        joint(reference.conv_norm_out, frames)
    return reference

def frames(array):
    return torch.tensor(array).flatten(0, 1).permute(0, 3, 1, 2)  # b f h w c -> (b f) c h w

def look_beside(attention, tokens, seen, count):
    # As MagicAnimate's hacked_basic_transformer_inner_forward.
    whole, rows = type(attention).forward, torch.tensor(seen).repeat_interleave(count)
    more = torch.tensor(tokens).repeat_interleave(count, dim=0)
    def forward(x, **_):
        y = whole(attention, x, encoder_hidden_states=torch.cat([x, more], dim=1))
        y[~rows] = whole(attention, x[~rows], encoder_hidden_states=x[~rows])
        return y
    attention.forward = forward

@torch.no_grad()
def apply(reference, latents, timestep, context, more):
    count = latents.shape[1]
    latents = torch.tensor(latents.transpose(0, 4, 1, 2, 3))  # b f h w c -> b c f h w
    context = torch.tensor(context).repeat_interleave(count, dim=0)  # b t d -> (b f) t d
    added = {}
    if more:
        layers = [layer for block in (reference.mid_block, *reference.up_blocks)
                  for layer in getattr(block, "attentions", ())]
        for layer, tokens in zip(layers, more["reference_states"], strict=True):
            look_beside(layer.transformer_blocks[0].attn1, tokens, more["reference_seen"], count)
        added["down_block_additional_residuals"] = tuple(map(frames, more["down_block_additional_residuals"]))
        added["mid_block_additional_residual"] = frames(more["mid_block_additional_residual"])
    return reference(latents, torch.tensor(timestep), context, **added).sample.numpy()

def inputs_beside(config, latents):
    draw = random.standard_normal
    return {
        "down_block_additional_residuals": tuple(map(draw, skip_shapes(config, latents))),
        "mid_block_additional_residual": draw(middle_shape(config, latents)),
        "reference_states": tuple(draw((latents[0], 5, width)) for width in reference_widths(config)),
        "reference_seen": np.array([False, True]),
    }

def error(ours, theirs):
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

run = jax.jit(lambda model, *inputs, **more: model(*inputs, **more))
torch.manual_seed(0)
random, errors = np.random.default_rng(0), {}
for name, (config, size) in json.loads(sys.argv[1]).items():
    folder = Path(sys.argv[2], name)
    fields = {k: v for k, v in config.items() if not k.startswith("_") and k not in OURS}
    reference = UNetMotionModel(**fields).double().eval()
    with torch.no_grad():
        for tensor in reference.parameters():
            fan_in = tensor[0].numel() if tensor.ndim > 1 else 0
            tensor.copy_(torch.randn(tensor.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.5))
    reference.save_pretrained(folder / "theirs")
    file = folder / "theirs" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **{k: config[k] for k in OURS if k in config}}))
    model = models.load(folder / "theirs")
    models.save(model, folder / "ours")
    back = UNetMotionModel.from_pretrained(folder / "ours", torch_dtype=torch.float64).eval()
    weights = back.state_dict()
    assert weights.keys() == reference.state_dict().keys()
    assert all(torch.equal(weights[key], tensor) for key, tensor in reference.state_dict().items())

    place_norms(reference, config, size[0]), place_norms(back, config, size[0])
    latents = random.standard_normal((2, *size, config["in_channels"]))
    context = random.standard_normal((2, 7, config["cross_attention_dim"]))
    more = inputs_beside(model.config, latents.shape) if "_networks_beside" in config else {}
    for case, timestep in {"zero": [0.0, 0.0], "ordinary": [999.0, 317.0]}.items():
        timestep = np.asarray(timestep)
        theirs = apply(reference, latents, timestep, context, more)
        ours = run(model, jnp.asarray(latents), timestep, context, **more)
        assert ours.dtype == jnp.float64
        errors[f"{name}: {case}"] = error(np.asarray(ours).transpose(0, 4, 1, 2, 3), theirs)
    errors[f"{name}: saved by us"] = error(apply(back, latents, timestep, context, more), theirs)
print(json.dumps(errors))
"""


@functools.cache
def errors(*names: str) -> dict[str, float]:
    """Relative L2 errors against diffusers in float64, in a process of its own (JAX's 64 bits are global)."""
    cases = {name: ({**UNET, **fields}, size) for name, (fields, size) in CASES.items() if name in names}
    with tempfile.TemporaryDirectory() as folder:
        return parity_errors(PARITY, cases, folder)


def check_parity(name: str, *together: str):
    found = errors(*together)
    # diffusers computes the timestep's sinusoid in float32: exact at timestep 0, where float64 rounding is left, and
    # off by up to 3e-5 at ordinary timesteps, of which the time embedding's two layers leave a part.
    assert found[f"{name}: zero"] <= 1e-6, found
    assert found[f"{name}: ordinary"] <= 1e-5, found
    # The same weights in the same program; torch sums in an order that depends on where arrays lie (float64 rounding).
    assert found[f"{name}: saved by us"] <= 1e-13, found


QUICK = ("v3", "MagicAnimate")


@pytest.mark.parametrize("name", QUICK)
def test_parity_with_diffusers(name):
    check_parity(name, *QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(CASES) - set(QUICK)))
def test_parity_with_diffusers_further(name):
    check_parity(name, *(set(CASES) - set(QUICK)))


# One level: down, middle, up twice. Compiling is what these tests cost, so the compiler takes no trouble.
ONE_LEVEL = {
    "block_out_channels": [16], "down_block_types": ["CrossAttnDownBlockMotion"],
    "up_block_types": ["CrossAttnUpBlockMotion"],
}  # fmt: skip
run = jax.jit(lambda model, inputs: model(**inputs), compiler_options={"xla_backend_optimization_level": 0})


def relative(one, other) -> float:
    """Relative L2 distance."""
    return float(jnp.linalg.norm(one.astype(jnp.float32) - other) / jnp.linalg.norm(other))


def variables(model):
    return [(path, variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(model))]


def test_load_is_the_inverse_of_save(tmp_path):
    check_round_trip(unet(dtype=jnp.bfloat16, motion_group_norm="per_frame"), tmp_path)


@pytest.mark.parametrize("fields", [ONE_LEVEL, pytest.param({}, marks=pytest.mark.slow)], ids=["one level", "two"])
def test_quantized_models_agree_in_both_executions(tmp_path, fields):
    model, inputs = unet(**fields), unet_inputs()
    quantized = qvdjax.quantize(model, "rtn-w8a8")
    rows = {row["path"]: row for row in qvdjax.describe(quantized)}
    bits = lambda path: (rows[path]["weight_bits"], rows[path]["activation_bits"])  # noqa: E731
    spatial, motion = "down_blocks.0.attentions.0", "mid_block.motion_modules.0"
    for name in (
        *(f"{spatial}.{part}" for part in ("proj_in", "proj_out", "transformer_blocks.0.attn2.to_k")),
        *(f"{motion}.{part}" for part in ("proj_in", "proj_out", "transformer_blocks.0.attn2.to_q")),
        *(f"{motion}.transformer_blocks.0.ff.net.{part}" for part in ("0.proj", "2")),
        *(f"up_blocks.0.resnets.1.{part}" for part in ("conv1", "conv2", "conv_shortcut")),
        *(() if fields else ("down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv")),
    ):  # fmt: skip
        assert bits(name) == (8, 8), name
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert bits(name) == (32, 32), name
    assert bits("mid_block.resnets.1.time_emb_proj") == (8, 32)  # weights only
    models.save(quantized, tmp_path / "model")
    loaded = models.load(tmp_path / "model", execution="integer")
    differences = layer_differences(loaded, inputs)
    assert len(differences) > 40
    # int32 sums against float32 sums of the same integers, hundreds of them.
    assert max(differences) < 2e-6
    # Some eighty products in a row, each with errors of some 1e-3 to 1e-2 from eight bits: convolutions have a single
    # range a frame.
    assert 1e-3 < relative(run(loaded, inputs), run(model, inputs)) < 1e-1


@pytest.mark.slow
def test_static_ranges_of_every_layer_are_seen():
    model, inputs = unet(**ONE_LEVEL), unet_inputs()
    quantized = qvdjax.quantize(model, "minmax-w8a8", [inputs])
    scales = [np.asarray(value) for path, value in variables(quantized) if path[-1] == "input_scale"]
    assert len(scales) == sum(row["activation_bits"] == 8 for row in qvdjax.describe(quantized))
    assert all(np.isfinite(scale).all() and (scale > 0).all() for scale in scales)
    assert 1e-3 < relative(run(quantized, inputs), run(model, inputs)) < 2e-1  # as above, with one range a layer


def test_a_quantized_folder_is_exported(tmp_path):
    quantized = qvdjax.quantize(unet(**ONE_LEVEL), "rtn-w4a8")
    models.save(quantized, tmp_path / "model")
    conversion.export(tmp_path / "model", tmp_path / "plain", "diffusers")
    plain, codes = models.load(tmp_path / "plain"), quantized.stacks[0].block.resnets["0"].conv1
    weight = plain.stacks[0].block.resnets["0"].conv1.weight[...]
    assert (weight == codes.qweight.dequantize().reshape(weight.shape)).all()  # out (in kh kw) -> out in kh kw


def test_layers_of_the_timestep_become_tables():
    model, inputs = unet(**ONE_LEVEL), unet_inputs()
    tabulated = qvdjax.tabulate(model, [999.0, 317.0, 1.0])
    tables = {row["path"] for row in qvdjax.describe(tabulated) if row["execution"] == "table"}
    resnets = ("down_blocks.0.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1", "up_blocks.0.resnets.0",
               "up_blocks.0.resnets.1")  # fmt: skip
    assert tables == {
        "time_embedding.linear_1", "time_embedding.linear_2", *(f"{name}.time_emb_proj" for name in resnets),
    }  # fmt: skip
    # The same products in another program: float32 rounding through five blocks.
    assert relative(run(tabulated, inputs), run(model, inputs)) < 1e-5


@pytest.mark.slow  # the shapes of some 1250 arrays are traced
@pytest.mark.parametrize(("fields", "count", "tensors"), [
    ({}, 1_312_730_244, 1253),
    ({"use_motion_mid_block": False, "motion_max_seq_length": 24}, 1_276_658_564, 1226),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(fields, count, tensors):
    model = models.abstract({"_class_name": "UNetMotionModel", "cross_attention_dim": 768, **fields})
    assert parameter_count(model) == count  # without position tables, which PyTorch keeps as buffers
    assert len(expected_tensors(model)) == tensors


def test_blocks_are_the_layers_of_the_levels():
    model = models.abstract({**UNET, **_THREE})
    prefixes = [stack.prefix for stack in model.stacks]
    levels = range(3)
    assert prefixes == [
        *(f"down_blocks.{i}" for i in levels for _ in range(2)), "mid_block",
        *(f"up_blocks.{i}" for i in levels for _ in range(3)),
    ]  # fmt: skip
    inputs = {**unet_inputs(), "latents": jnp.zeros((2, 3, 8, 12, 5))}
    stream, conditioning = jax.eval_shape(lambda m, i: m.embed(**i), model, inputs)
    opened = []
    for stack in model.stacks:
        stream, _ = jax.eval_shape(lambda s, x, c: s(x, c), stack, stream, conditioning)
        opened.append(len(stream.skips))
    # Each layer opens one, each level but the last one more; each layer of the way up closes one.
    assert opened == [2, 4, 5, 7, 8, 9, 9, *range(8, -1, -1)]
    assert stream.sample.shape == (2, 3, 8, 12, 16)


def test_every_parameter_names_its_axes():
    model = models.abstract({**UNET, **_THREE})
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        assert variable.get_value().ndim == len(variable.get_metadata("axes")), path


def test_positions_are_sines_and_cosines():
    table = PositionTable(5, 16, dtype=jnp.float32).pe
    angles = 4 / 10000 ** (np.arange(0, 16, 2) / 16)
    assert table[...].shape == (1, 5, 16)
    np.testing.assert_allclose(table[...][0, 4, 0::2], np.sin(angles), atol=1e-6)  # float32
    np.testing.assert_allclose(table[...][0, 4, 1::2], np.cos(angles), atol=1e-6)


@pytest.mark.slow
def test_remat_changes_neither_value_nor_gradient():
    model, inputs = unet(**ONE_LEVEL), unet_inputs()
    graph, parameters, rest = nnx.split(model, nnx.Param, ...)
    loss = lambda p, remat: (nnx.merge(graph, p, rest)(**inputs, remat=remat) ** 2).mean()  # noqa: E731
    take = jax.jit(jax.value_and_grad(loss), static_argnums=1, compiler_options={"xla_backend_optimization_level": 0})
    # Recomputation fuses differently: float32 rounding, relative to the largest of a parameter's gradients.
    plain, remat = (jax.tree.leaves(take(parameters, r)) for r in (False, True))
    for one, other in zip(plain, remat, strict=True):
        chex.assert_trees_all_close(one, other, atol=1e-3 * float(jnp.abs(one).max()) + 1e-6)


def test_bfloat16_keeps_its_float32_islands(tmp_path):
    model, inputs = unet(**ONE_LEVEL), unet_inputs()
    models.save(model, tmp_path / "model")
    narrow = models.load(tmp_path / "model", dtype="bfloat16")
    block = narrow.stacks[0].block
    motion = block.motion_modules["0"]
    islands = (
        block.resnets["0"].norm1.weight, motion.norm.bias, motion.transformer_blocks["0"].norm1.weight,
        motion.transformer_blocks["0"].pos_embed.pe, narrow.time_embedding.linear_1.weight, narrow.conv_norm_out.weight,
    )  # fmt: skip
    assert all(variable[...].dtype == jnp.float32 for variable in islands)
    assert block.resnets["0"].conv1.weight[...].dtype == jnp.bfloat16
    out = run(narrow, inputs)
    assert out.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits; four blocks of some twenty roundings each.
    assert relative(out, run(model, inputs)) < 0.1


@pytest.mark.parametrize(("change", "message"), [
    ({"latents": jnp.zeros((2, 6, 4, 6, 5))}, "6 latent frames do not fit the 5 positions .* 1 to 5 frames"),
    ({"latents": jnp.zeros((2, 0, 4, 6, 5))}, "0 latent frames"),
    ({"latents": jnp.zeros((2, 3, 5, 6, 5))}, "latent height 5 is no multiple of 2; it is halved 1 times"),
    ({"latents": jnp.zeros((2, 3, 4, 7, 5))}, "latent width 7 is no multiple of 2"),
    ({"latents": jnp.zeros((2, 3, 4, 0, 5))}, "latent width 0"),
    ({"latents": jnp.zeros((2, 3, 4, 6, 4))}, "5 channels"),
    ({"latents": jnp.zeros((2, 4, 6, 5))}, "latents of shape"),
    ({"timestep": jnp.zeros((2, 72))}, "one a video"),
    ({"context": jnp.zeros((2, 7, 23))}, "text embeddings .batch, tokens, 24"),
    ({"context": jnp.zeros((7, 24))}, "a context of shape"),
])  # fmt: skip
def test_wrong_sizes_are_said(change, message):
    config = models.parse_config(UNET)
    shapes = {name: array.shape for name, array in {**unet_inputs(), **change}.items()}
    with pytest.raises(UserError, match=message):
        check_inputs(config, **shapes)


def test_the_model_checks_its_inputs():
    with pytest.raises(UserError, match="9 latent frames"):
        models.abstract({**UNET, **ONE_LEVEL})(**{**unet_inputs(), "latents": jnp.zeros((2, 9, 4, 6, 5))})


def beside(latents=(2, 3, 4, 6, 5)):
    """What networks beside a model of `UNET` give it."""
    config, zeros = models.parse_config(UNET), jnp.zeros
    return {
        "down_block_additional_residuals": tuple(map(zeros, skip_shapes(config, latents))),
        "mid_block_additional_residual": zeros(middle_shape(config, latents)),
        "reference_states": tuple(zeros((latents[0], 7, width)) for width in reference_widths(config)),
        "reference_seen": jnp.array([True, False]),
    }


@pytest.mark.parametrize(("name", "change", "message"), [
    ("down_block_additional_residuals", lambda a: a[:-1], "3 down_block_additional_residuals beside 4 skip"),
    ("down_block_additional_residuals", lambda a: (*a[:-1], a[0]), r"residuals\[3\] of shape .* does not fit"),
    ("mid_block_additional_residual", lambda a: a[:1], "mid_block_additional_residual of shape"),
    ("reference_states", lambda a: a[:-1], "2 reference_states for 3 self-attentions"),
    ("reference_states", lambda a: (a[0], a[1][..., 1:], a[2]), r"states\[1\] of shape .*\(batch 2, tokens, 16\)"),
    ("reference_states", lambda a: None, "reference_seen without reference_states"),
    ("reference_seen", lambda a: a[:1], r"reference_seen of shape \(1,\).*\(2,\)"),
])  # fmt: skip
def test_what_does_not_fit_beside_the_model_is_said(name, change, message):
    given = beside()
    with pytest.raises(UserError, match=message):
        models.abstract(UNET)(**unet_inputs(), **{**given, name: change(given[name])})


def test_what_is_not_seen_changes_nothing():
    """A video that does not look at the reference, and residuals of zero, are the model without either."""
    model, inputs = unet(), unet_inputs()
    given = beside()
    given["reference_states"] = tuple(jax.random.normal(jax.random.key(5), a.shape) for a in given["reference_states"])
    plain, both = run(model, inputs), run(model, {**inputs, **given})
    # Keys that do not count add exact zeros to sums in another order: float32 rounding through four blocks.
    np.testing.assert_allclose(both[1], plain[1], rtol=1e-4, atol=1e-5)
    assert relative(both[:1], plain[:1]) > 1e-3


@pytest.mark.parametrize(("change", "message"), [
    ({"wings": 2}, "fields"),
    ({"act_fn": "gelu"}, "act_fn 'gelu' is not supported"),
    ({"mid_block_scale_factor": 2.0}, "mid_block_scale_factor 2.0"),
    ({"downsample_padding": 2}, "downsample_padding 2"),
    ({"layers_per_block": [1, 1]}, r"layers_per_block is \[1, 1\]"),
    ({"num_attention_heads": [2, 4]}, r"num_attention_heads is \[2, 4\]"),
    ({"transformer_layers_per_block": 2}, "transformer_layers_per_block 2"),
    ({"transformer_layers_per_mid_block": 2}, "transformer_layers_per_mid_block 2"),
    ({"temporal_transformer_layers_per_block": 2}, "temporal_transformer_layers_per_block 2"),
    ({"addition_embed_type": "text_time"}, "addition_embed_type 'text_time'.*Stable Diffusion 1.5"),
    ({"encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type"),
    ({"block_out_channels": []}, r"block_out_channels is \[\]"),
    ({"block_out_channels": 16}, "block_out_channels is 16"),
    ({"block_out_channels": [16, "32"]}, "block_out_channels has '32'"),
    ({"block_out_channels": [16, 2**20]}, "block_out_channels has 1048576"),
    ({"block_out_channels": [16, 30]}, "norm_num_groups 4 does not divide 30"),
    ({"num_attention_heads": 5}, "num_attention_heads 5 does not divide 16"),
    ({"motion_num_attention_heads": 32}, "motion_num_attention_heads 32 does not divide 16"),
    ({"block_out_channels": [5, 5], "norm_num_groups": 5, "num_attention_heads": 1, "motion_num_attention_heads": 1},
     "5, an odd number"),
    ({"block_out_channels": [16]}, "down_block_types has 2 entries, block_out_channels 1"),
    ({"block_out_channels": [16] * 9, "down_block_types": ["DownBlockMotion"] * 9,
      "up_block_types": ["UpBlockMotion"] * 9}, "9 levels"),
    ({"down_block_types": ["DownBlockMotion", "DownBlock2D"]}, "down_block_types has 'DownBlock2D'"),
    ({"up_block_types": ["UpBlockMotion"]}, "up_block_types has 1 entries"),
    ({"motion_group_norm": "both"}, "motion_group_norm is 'both'.*per_frame, joint"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0"),
])  # fmt: skip
def test_wrong_configurations_are_said(change, message):
    with pytest.raises(UserError, match=message):
        models.parse_config({**UNET, **change})


@pytest.mark.parametrize("fields", [{}, _THREE, {"motion_group_norm": "per_frame", "resnet_group_norm": "joint"}])
def test_a_config_survives_the_round_trip(fields):
    config = models.parse_config({**UNET, **fields})
    assert models.parse_config(json.loads(json.dumps(config.to_dict()))) == config
    # diffusers' own fields alone, unless something else than diffusers is computed.
    assert ("motion_group_norm" in config.to_dict()) == ("motion_group_norm" in fields)


def test_a_block_under_other_names_is_the_same_block():
    """What blocks of equal shape are renamed to, so that they share a program, and the way back to their names."""
    model = unet(layers_per_block=2)
    stack = next(s for s in model.stacks if s.prefix == "up_blocks.1" and ("resnets", "1") in s.block.order)
    block, moved = stack.block.unplaced()
    assert ("resnets", "0") in block.order
    assert moved["resnets", "0"] == ("resnets", "1")
    assert moved["motion_modules", "0"] == ("motion_modules", "1")
    assert stack.block.order[0] == ("resnets", "1")  # left as it is
    shapes = lambda one: [array.shape for array in jax.tree.leaves(one)]  # noqa: E731
    assert sorted(shapes(block)) == sorted(shapes(stack.block))
    assert block.resnets["0"].conv1.weight[...] is stack.block.resnets["1"].conv1.weight[...]
