"""Model folders: what is saved is read back bit for bit, plain or quantized, on one device or sharded."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from round_trip import check_round_trip
from small_models import wan, wan_inputs

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
