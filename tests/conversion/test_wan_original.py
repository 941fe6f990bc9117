"""Wan's original names: a bijection over the real model's keys, and configurations read from shapes."""

import dataclasses

import pytest

import models
from conversion import wan_original
from qvdjax.checkpoint import expected_tensors
from qvdjax.errors import UserError

WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 12,
    "num_layers": 30,
    "ffn_dim": 8960,
}


WAN_I2V_14B = {
    "_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16, "image_dim": 1280,
    "added_kv_proj_dim": 5120,
}  # fmt: skip


@pytest.fixture(scope="module")
def real():
    """diffusers key -> what Wan-1.3B holds there."""
    return expected_tensors(models.abstract(WAN_1_3B))


def test_the_names_are_a_bijection_over_the_real_keys(real):
    assert len(real) == 825  # counted in diffusers' own WanTransformer3DModel of this configuration
    original = {key: wan_original.to_original(key) for key in real}
    assert None not in original.values()
    assert len(set(original.values())) == 825
    assert {key: wan_original.to_diffusers(name) for key, name in original.items()} == {key: key for key in real}
    assert wan_original.is_original(original.values())
    assert not wan_original.is_original(real)


def test_the_real_keys_are_those_of_diffusers(real):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    config = {name: value for name, value in WAN_1_3B.items() if name != "_class_name"}
    with torch.device("meta"):
        theirs = diffusers.WanTransformer3DModel(**config).state_dict()
    shapes = {key: tensor.shape for key, tensor in real.items()}
    assert {key: tuple(tensor.shape) for key, tensor in theirs.items()} == shapes


def test_image_to_video_has_the_names_and_shapes_of_diffusers_and_survives_both_ways():
    ours = {key: tensor.shape for key, tensor in expected_tensors(models.abstract(WAN_I2V_14B)).items()}
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        fields = {name: value for name, value in WAN_I2V_14B.items() if name != "_class_name"}
        theirs = diffusers.WanTransformer3DModel(**fields).state_dict()
    assert ours == {key: tuple(tensor.shape) for key, tensor in theirs.items()}
    original = {key: wan_original.to_original(key) for key in ours}
    assert len(set(original.values()) - {None}) == len(ours)
    assert {key: wan_original.to_diffusers(name) for key, name in original.items()} == {key: key for key in ours}
    found = wan_original.infer_config(expected_tensors(models.abstract(WAN_I2V_14B)), {})
    assert models.parse_config(found) == models.parse_config(WAN_I2V_14B)
    said = wan_original.original_config(models.parse_config(WAN_I2V_14B).to_dict())
    assert (said["model_type"], said["in_dim"], said["out_dim"]) == ("i2v", 36, 16)


def test_the_norm_with_weights_is_norm3_there_and_norm2_here():
    assert wan_original.to_diffusers("blocks.7.norm3.weight") == "blocks.7.norm2.weight"
    assert wan_original.to_original("blocks.7.norm2.bias") == "blocks.7.norm3.bias"


# Written by hand from Wan-Video/Wan2.1 `wan/modules/model.py`, image-to-video included.
PAIRS = {
    "patch_embedding.bias": "patch_embedding.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.bias": "condition_embedder.time_proj.bias",
    "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    "head.head.weight": "proj_out.weight",
    "head.modulation": "scale_shift_table",
    "blocks.11.modulation": "blocks.11.scale_shift_table",
    "blocks.3.self_attn.o.weight": "blocks.3.attn1.to_out.0.weight",
    "blocks.3.cross_attn.norm_k.weight": "blocks.3.attn2.norm_k.weight",
    "blocks.3.cross_attn.v_img.bias": "blocks.3.attn2.add_v_proj.bias",
    "blocks.3.cross_attn.norm_k_img.weight": "blocks.3.attn2.norm_added_k.weight",
    "blocks.3.ffn.0.weight": "blocks.3.ffn.net.0.proj.weight",
    "blocks.3.ffn.2.bias": "blocks.3.ffn.net.2.bias",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.proj.4.bias": "condition_embedder.image_embedder.norm2.bias",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
}


@pytest.mark.parametrize("original", PAIRS)
def test_pairs(original):
    assert wan_original.to_diffusers(original) == PAIRS[original]
    assert wan_original.to_diffusers(f"model.diffusion_model.{original}") == PAIRS[original]
    assert wan_original.to_original(PAIRS[original]) == original


STRANGERS = (
    "",
    "blocks.0",
    "blocks.x.ffn.0.weight",
    "blocks.0.ffn.1.weight",
    "head.modulation.weight",
    "vae.conv.weight",
    "blocks.0.self_attn.q.scale_weight",
    "blocks.0.self_attn.q",
    "time_embedding.1.weight",
)


@pytest.mark.parametrize("key", STRANGERS)
def test_keys_that_wan_does_not_have(key):
    assert wan_original.to_diffusers(key) is None


def test_the_configuration_is_read_from_shapes(real):
    built = models.parse_config(wan_original.infer_config(real, {}))
    assert built == models.parse_config(WAN_1_3B)


def test_what_shapes_do_not_tell_comes_from_the_original_config(real):
    stated = {"num_heads": 24, "eps": 1e-5, "dim": 1536, "ffn_dim": 8960, "num_layers": 30, "in_dim": 16}
    config = wan_original.infer_config(real, stated)
    assert (config["num_attention_heads"], config["attention_head_dim"], config["eps"]) == (24, 64, 1e-5)
    assert wan_original.original_config(config) | stated == wan_original.original_config(config)


def test_a_config_that_contradicts_the_weights_is_refused(real):
    with pytest.raises(UserError, match="contradicts the weights") as error:
        wan_original.infer_config(real, {"dim": 1536, "num_layers": 40})
    assert error.value.items == ("num_layers 40, 30 by shape",)
    for heads in (7, 0, "12"):
        with pytest.raises(UserError, match="is no"):
            wan_original.infer_config(real, {"num_heads": heads})


def test_weights_that_decide_must_be_there(real):
    for key in ("patch_embedding.weight", "proj_out.weight", "blocks.0.ffn.net.0.proj.weight"):
        with pytest.raises(UserError, match=key):
            wan_original.infer_config({k: v for k, v in real.items() if k != key}, {})
        with pytest.raises(UserError, match=key):
            wan_original.infer_config(real | {key: dataclasses.replace(real[key], shape=(3,))}, {})
