"""Model folders: what is saved is read back bit for bit, plain or quantized, on one device or sharded."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from round_trip import check_round_trip
from safetensors.numpy import load_file, save_file
from small_models import WAN_I2V, wan, wan_inputs

import conversion
import models
import qvdjax
from qvdjax.errors import UserError
from qvdjax.nn import QUANTIZED_LAYERS, layers_of
from qvdjax.parallel import make_mesh
from qvdjax.recipes import get

MIXED = {"skip": r"blocks\.(0|2)\..*", "group_size": "16", "weight_symmetric": "false", "attention_qk_bits": 8}
RECIPES = {
    "plain": None, "w8a8": get("rtn-w8a8"), "w3a8": get("rtn-w3a8"), "static": get("minmax-w8a8"),
    "smoothed": get("smoothquant-w4a4"), "mixed": get("rtn-w4a4", **MIXED), "w5a16": get("rtn-w5a16"),
    "rotated": get("quarot-w4a4", block="32"), "branches": get("svdquant-w4a4", rank=4),
}  # fmt: skip


def make(recipe, dtype=jnp.bfloat16):
    model = wan(dtype=dtype)
    return model if recipe is None else qvdjax.quantize(model, recipe, [wan_inputs()])


def variables(model):
    return [(path, variable.get_value()) for path, variable in nnx.to_flat_state(nnx.state(model))]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_load_is_the_inverse_of_save(tmp_path, recipe):
    model = make(recipe)
    loaded = check_round_trip(model, tmp_path)
    assert qvdjax.describe(loaded) == qvdjax.describe(model)


def test_a_skeleton_has_the_shapes_and_types_of_the_folder(tmp_path):
    models.save(make(RECIPES["mixed"]), tmp_path / "model")
    skeleton, loaded = models.skeleton(tmp_path / "model"), models.load(tmp_path / "model")
    for (path, abstract), (_, array) in zip(variables(skeleton), variables(loaded)):
        assert (abstract.shape, abstract.dtype) == (array.shape, array.dtype), path
    without_ratios = [{**row, "sqnr_db": None} for row in qvdjax.describe(loaded)]
    assert qvdjax.describe(skeleton) == without_ratios


def test_dtype_leaves_float32_islands(tmp_path):
    models.save(wan(), tmp_path / "model")
    loaded = models.load(tmp_path / "model", dtype="bfloat16")
    block = loaded.stacks[0].block
    assert block.attn1.to_q.weight[...].dtype == jnp.bfloat16
    islands = (block.scale_shift_table, block.norm2.weight, loaded.condition_embedder.time_embedder["linear_1"].weight)
    assert all(variable[...].dtype == jnp.float32 for variable in islands)


def test_execution_is_chosen_when_loading(tmp_path):
    models.save(make(RECIPES["w8a8"]), tmp_path / "model")
    for execution in ("integer", "simulate"):
        loaded = models.load(tmp_path / "model", execution=execution)
        assert {layer.execution for _, _, layer in layers_of(loaded, QUANTIZED_LAYERS)} == {execution}
    with pytest.raises(UserError, match="execution"):
        models.load(tmp_path / "model", execution="magic")


@pytest.mark.parametrize("recipe", ["plain", "mixed", "rotated", "branches"])
def test_sharded_loading_gives_the_same_arrays(tmp_path, recipe):
    models.save(make(RECIPES[recipe]), tmp_path / "model")
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    whole, sharded = models.load(tmp_path / "model"), models.load(tmp_path / "model", mesh=mesh)
    spread = 0
    for (path, one), (_, many) in zip(variables(whole), variables(sharded)):
        assert (np.asarray(one) == np.asarray(many)).all(), path
        spread += not many.sharding.is_fully_replicated
    assert spread > 10


@pytest.mark.parametrize(("edit", "message"), [
    (lambda q: q["qvdjax"].update(version=99), "version"),
    (lambda q: q.pop("qvdjax"), "not qvdjax's"),
    (lambda q: q["qvdjax"]["layers"].update({"blocks.0.attn1.to_q": 99}), "cannot be understood"),
    (lambda q: q["qvdjax"]["layers"].update({"blocks.0.attn1.to_q": -1}), "cannot be understood"),
    (lambda q: q["qvdjax"]["layers"].update({"blocks.9.attn1.to_q": 0}), "lacks"),
    (lambda q: q["qvdjax"]["schemes"][0].update(wings=2), "cannot be understood"),
    (lambda q: q["qvdjax"].update(schemes="many"), "cannot be understood"),
    (lambda q: [s["weight"].update(bits=3) for s in q["qvdjax"]["schemes"] if s.get("weight")], "does not fit"),
])  # fmt: skip
def test_a_damaged_quantization_config_is_refused(tmp_path, edit, message):
    models.save(make(RECIPES["w8a8"]), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    edit(config["quantization_config"])
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        models.load(tmp_path / "model")


def test_the_config_speaks_compressed_tensors_vocabulary(tmp_path):
    models.save(make(RECIPES["smoothed"]), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    assert groups["blocks.2.ffn.net.2"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None, "dynamic": False,
    }  # fmt: skip
    assert groups["blocks.2.ffn.net.2"]["input_activations"]["strategy"] == "token"
    assert groups["condition_embedder.time_proj"]["input_activations"] is None
    assert "proj_out" in config["ignore"]
    assert not set(config["ignore"]) & set(groups)


@pytest.mark.parametrize("recipe", [None, "rtn-w4a8", "orbitquant-w4a4"])
def test_image_to_video_models_are_read_and_quantized_too(tmp_path, recipe):
    model = wan(**WAN_I2V)
    image = np.random.default_rng(0)
    inputs = {
        **wan_inputs(), "image_latents": image.standard_normal((2, 3, 8, 6, 4)).astype(np.float32),
        "encoder_hidden_states_image": image.standard_normal((2, 6, 20)).astype(np.float32),
    }  # fmt: skip
    exact = jax.jit(lambda m, i: m(**i))(model, inputs)
    if recipe is not None:
        model = qvdjax.quantize(model, recipe)
        rows = {row["path"]: row["role"] for row in qvdjax.describe(model) if row["weight_bits"] == 4}
        assert (rows["blocks.1.attn2.add_k_proj"], rows["blocks.1.attn2.add_v_proj"]) == ("key", "value")
        error = jnp.linalg.norm(jax.jit(lambda m, i: m(**i))(model, inputs) - exact) / jnp.linalg.norm(exact)
        assert 1e-3 < error < 0.9  # another function, and still about the same
    check_round_trip(model, tmp_path)


def test_tensors_that_no_program_uses_are_left_aside(tmp_path):
    """As in folders of Wan's image-to-video models that an older version of diffusers wrote."""
    models.save(wan(**WAN_I2V), tmp_path / "model")
    file = tmp_path / "model" / "diffusion_pytorch_model.safetensors"
    unused = {f"blocks.{block}.attn2.norm_added_q.weight": np.ones(64, np.float32) for block in range(3)}
    save_file({**load_file(file), **unused}, file)
    models.load(tmp_path / "model")
    models.skeleton(tmp_path / "model")
    assert conversion.convert(tmp_path / "model", tmp_path / "copy")["tensors"] == len(load_file(file)) - 3
    save_file({**load_file(file), "blocks.0.attn2.norm_added_x.weight": np.ones(64, np.float32)}, file)
    with pytest.raises(UserError, match="1 unknown"):
        models.load(tmp_path / "model")
