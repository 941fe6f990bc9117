"""T5's and UMT5's encoders: parity with transformers, folders as transformers writes them, bad input."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import parity_errors
from safetensors.numpy import load_file, save_file
from small_models import T5, UMT5, encoder, encoder_folder

import models
from models.encoders import build_encoder, load_encoder
from models.text_t5 import relative_buckets
from qvdjax.checkpoint.variables import expected_tensors
from qvdjax.errors import UserError

PARITY = """
import json, sys
from pathlib import Path
import jax, numpy as np, torch, transformers
from models.encoders import load_encoder

cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
random, errors = np.random.default_rng(0), {}
for name, (config, tokens, shard) in cases.items():
    torch.manual_seed(0)
    kind = {"t5": "T5", "umt5": "UMT5"}[config["model_type"]]
    parsed = getattr(transformers, kind + "Config")(**config)
    reference = getattr(transformers, kind + "EncoderModel")(parsed).double().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            # Embeddings and biases of positions are as large as they are in trained models, where they matter.
            spread = 1.0 if parameter.shape[0] in (config["vocab_size"], parsed.relative_attention_num_buckets) else (
                0.9 / parameter.shape[1] ** 0.5 if parameter.ndim > 1 else 0.5)
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * spread)
    reference.save_pretrained(folder / name, max_shard_size=shard)
    assert (folder / name / "model.safetensors.index.json").exists() == (shard == "20KB")
    numbers = random.integers(0, config["vocab_size"], (2, tokens))
    mask = np.arange(tokens) < np.array([[tokens], [tokens // 2]])
    model = load_encoder(folder / name)
    for masked in (True, False):
        with torch.no_grad():
            given = torch.tensor(numbers), torch.tensor(mask).long() if masked else None
            theirs = reference(*given).last_hidden_state.numpy()
        ours = np.asarray(jax.jit(lambda m, *a: m(*a))(model, numbers, mask if masked else None))
        assert ours.dtype == np.float64
        kind = "masked" if masked else "whole"
        errors[f"{name}, {kind}"] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
print(json.dumps(errors))
"""


def test_parity_with_transformers(tmp_path):
    cases = {
        "t5": (T5, 41, "1GB"),  # beyond the largest distance
        "umt5 in shards": (UMT5, 41, "20KB"),
        "other buckets": (
            {**UMT5, "relative_attention_num_buckets": 12, "relative_attention_max_distance": 9}, 17, "1GB",
        ),
    }  # fmt: skip
    errors = parity_errors(PARITY, cases, tmp_path)
    assert len(errors) == 6
    # transformers takes the mean square of its norms in float32, 6e-8 off at most each; random weights of three blocks
    # make it a few times larger.
    assert max(errors.values()) <= 1e-6, errors


@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (32, 40), (12, 9), (64, 512)])
def test_buckets_are_transformers(buckets, distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    offset = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    theirs = T5Attention._relative_position_bucket(offset, num_buckets=buckets, max_distance=distance)
    np.testing.assert_array_equal(relative_buckets(600, buckets, distance), theirs.numpy())


def test_padding_does_not_reach_the_text():
    model = encoder(UMT5)
    tokens, mask = jnp.arange(10)[None] % 7, (jnp.arange(10) < 6)[None]
    other = tokens.at[:, 6:].set(3)
    run = jax.jit(lambda m, *a: m(*a))
    np.testing.assert_array_equal(run(model, tokens, mask)[:, :6], run(model, other, mask)[:, :6])
    assert not np.allclose(run(model, tokens)[:, :6], run(model, other)[:, :6])


@pytest.mark.parametrize(("fields", "count"), [
    # google/t5-v1_1-xxl and google/umt5-xxl, encoders alone: 4.76e9 and 5.68e9 parameters.
    ({"model_type": "t5", "vocab_size": 32128, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
      "num_heads": 64, "feed_forward_proj": "gated-gelu"}, 4_762_310_656),
    ({"model_type": "umt5", "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24,
      "num_heads": 64, "feed_forward_proj": "gated-gelu"}, 5_680_910_336),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(fields, count):
    model = jax.eval_shape(lambda: build_encoder(fields))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


@pytest.mark.parametrize("config", [T5, UMT5], ids=["t5", "umt5"])
def test_every_parameter_names_its_axes(config):
    for path, variable in nnx.to_flat_state(nnx.state(jax.eval_shape(lambda: build_encoder(config)))):
        leading = 1 if path[0] == "stacks" else 0
        assert variable.get_value().ndim == leading + len(variable.get_metadata("axes")), path


def test_the_first_blocks_table_is_t5s_only_one():
    tables = [key for key in expected_tensors(encoder(T5)) if "relative_attention_bias" in key]
    assert tables == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    assert sum("relative_attention_bias" in key for key in expected_tensors(encoder(UMT5))) == 3


def rewrite(folder, edit):
    """The folder with its tensors changed in place by `edit`."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def arrays(model):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(model)]


@pytest.mark.parametrize("edit", [
    lambda t: t.update({"encoder.embed_tokens.weight": t.pop("shared.weight")}),
    lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"].copy()}),
    lambda t: t.update({"decoder.final_layer_norm.weight": np.ones(24, np.float32), "lm_head.weight": np.ones((9, 9))}),
], ids=["the other name", "both names", "a whole model"])  # fmt: skip
def test_folders_of_other_programs_are_read(tmp_path, edit):
    folder = encoder_folder(tmp_path / "encoder", UMT5)
    before = arrays(load_encoder(folder))
    rewrite(folder, edit)
    for one, other in zip(before, arrays(load_encoder(folder)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_two_embeddings_that_differ_are_refused(tmp_path):
    folder = encoder_folder(tmp_path / "encoder", UMT5)
    rewrite(folder, lambda t: t.update({"encoder.embed_tokens.weight": t["shared.weight"] + 1}))
    with pytest.raises(UserError, match=r"one tensor and differ; download"):
        load_encoder(folder)


@pytest.mark.parametrize(("change", "message"), [
    ({"model_type": "bert"}, "'bert', which is not known; known: .*t5"),
    ({"model_type": ["t5"]}, "not known"),
    ({"feed_forward_proj": "relu"}, "'relu'; T5 v1.1"),
    ({"d_model": 0}, "d_model is 0; it must be a positive integer"),
    ({"num_layers": 10**9}, "num_layers is"),
    ({"relative_attention_num_buckets": 6}, "6 buckets"),
    ({"relative_attention_max_distance": 8}, "distance"),
    ({"d_ff": 41}, "does not fit the model its config describes"),
])  # fmt: skip
def test_bad_configurations_are_said(tmp_path, change, message):
    folder = encoder_folder(tmp_path / "encoder", T5)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_encoder(folder)


def test_missing_weights_are_said(tmp_path):
    folder = encoder_folder(tmp_path / "encoder", T5)
    shutil.move(folder / "model.safetensors", folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"holds no model.safetensors, but .*pytorch_model.bin.*save the weights"):
        load_encoder(folder)


def test_float16_weights_are_computed_with_in_float32(tmp_path):
    folder = encoder_folder(tmp_path / "encoder", T5)
    narrow = load_encoder(folder, dtype="float16")
    # As large as T5-XXL's stream becomes, which overflows float16 (65504).
    rows = narrow.shared.weight[...].at[:, 0].set(60000.0)
    narrow.shared.weight[...] = rows
    out = narrow(jnp.arange(5)[None])
    assert out.dtype == jnp.float32
    assert np.isfinite(out).all()


def test_a_quantized_encoder_survives_the_round_trip(tmp_path):
    import qvdjax

    model = qvdjax.quantize(load_encoder(encoder_folder(tmp_path / "float", UMT5)), "rtn-w8a16")
    models.save(model, tmp_path / "int8")
    loaded = load_encoder(tmp_path / "int8")
    assert loaded.recipe_name == "rtn-w8a16"
    assert qvdjax.describe(loaded) == qvdjax.describe(model)
    assert {row["weight_bits"] for row in qvdjax.describe(model)} == {8}
    tokens = jnp.arange(6)[None]
    np.testing.assert_array_equal(loaded(tokens), model(tokens))
