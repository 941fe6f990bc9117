"""Llama as an encoder: parity with transformers, what is skipped, folders, parameter counts, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import parity_errors
from safetensors.numpy import load_file, save_file
from small_models import LLAMA, encoder, encoder_folder

import models
import qvdjax
from models.encoders import build_encoder, load_encoder
from qvdjax.errors import UserError

PARITY = """
import json, sys
from pathlib import Path
import jax, numpy as np, torch, transformers
from models.encoders import load_encoder

cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
random, errors = np.random.default_rng(0), {}
run = jax.jit(lambda m, *a, **k: m(*a, **k), static_argnames="output")
for name, (config, kind) in cases.items():
    torch.manual_seed(0)
    reference = getattr(transformers, kind)(transformers.LlamaConfig(**config)).double().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            fan_in = parameter.shape[1] if parameter.ndim > 1 and parameter.shape[0] != config["vocab_size"] else 0
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.7))
    reference.save_pretrained(folder / name)
    model = load_encoder(folder / name)
    numbers = random.integers(0, config["vocab_size"], (2, 23))
    mask = np.arange(23) < np.array([[23], [9]])
    whole = getattr(reference, "model", reference)
    for masked in (True, False):
        with torch.no_grad():
            theirs = whole(torch.tensor(numbers), torch.tensor(mask).long() if masked else None,
                           output_hidden_states=True)
        for output, state in (("tokens", theirs.last_hidden_state), ("skipped", theirs.hidden_states[-3])):
            ours = np.asarray(run(model, numbers, mask if masked else None, output=output))
            assert ours.dtype == np.float64
            kept = mask if masked else np.ones_like(mask)
            ours, state = ours[kept], state.numpy()[kept]
            errors[f"{name}, {output}, {masked}"] = float(np.linalg.norm(ours - state) / np.linalg.norm(state))
print(json.dumps(errors))
"""


def test_parity_with_transformers(tmp_path):
    wide = {**LLAMA, "num_key_value_heads": 4, "head_dim": 10, "rope_theta": 300.0, "num_hidden_layers": 5}
    errors = parity_errors(PARITY, {"shared": (LLAMA, "LlamaModel"), "wide": (wide, "LlamaForCausalLM")}, tmp_path)
    assert len(errors) == 8
    # transformers has positions' angles, up to 22, and the mean squares of its norms in float32: 1e-6 and 6e-8 off at
    # most, which random weights of five blocks make a few times larger.
    assert max(errors.values()) <= 1e-5, errors


def test_what_comes_later_and_padding_do_not_reach_a_token():
    model, run = encoder(LLAMA), jax.jit(lambda m, *a: m(*a))
    tokens, mask = jnp.arange(10)[None] % 7, (jnp.arange(10) < 6)[None]
    other = tokens.at[:, 6:].set(3)
    np.testing.assert_array_equal(run(model, tokens)[:, :6], run(model, other)[:, :6])
    np.testing.assert_array_equal(run(model, tokens, mask)[:, :6], run(model, tokens)[:, :6])
    assert not np.allclose(run(model, tokens)[:, 6:], run(model, other)[:, 6:])


def test_skipped_blocks_are_not_computed():
    model = encoder(LLAMA)
    tokens = jnp.arange(7)[None]
    cost = {
        output: jax.jit(lambda m, t, output=output: m(t, output=output)).lower(model, tokens).compile()
        .cost_analysis()["flops"] for output in ("tokens", "skipped")
    }  # fmt: skip
    # A scan's body is counted once, and there are two scans or one.
    assert cost["skipped"] < 0.6 * cost["tokens"]
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        if path[:2] == ("stacks", 1) or path[0] == "norm":
            variable[...] = jnp.nan * variable[...]
    assert np.isfinite(model(tokens, output="skipped")).all()
    assert np.isnan(model(tokens)).all()


def test_parameter_count_of_the_published_model():
    # Llama 3 8B without its head: 8,030,261,248 - 128256 x 4096, and 64 more tokens of LLaVA's vocabulary.
    fields = {"model_type": "llama", "vocab_size": 128320, "hidden_size": 4096, "intermediate_size": 14336,
              "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
              "rms_norm_eps": 1e-5, "max_position_embeddings": 8192}  # fmt: skip
    model = jax.eval_shape(lambda: build_encoder(fields))
    count = sum(leaf.size for leaf in jax.tree.leaves(model))
    assert count == 8_030_261_248 - 128256 * 4096 + 64 * 4096
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        leading = 1 if path[0] == "stacks" else 0
        assert variable.get_value().ndim == leading + len(variable.get_metadata("axes")), path


def test_it_is_quantized_and_stored(tmp_path):
    model, tokens = load_encoder(encoder_folder(tmp_path / "plain", LLAMA)), jnp.arange(9)[None]
    quantized = qvdjax.quantize(model, "rtn-w8a16")
    models.save(quantized, tmp_path / "w8")
    run = jax.jit(lambda m, t: m(t, output="skipped"))
    whole, rounded = run(model, tokens), run(load_encoder(tmp_path / "w8"), tokens)
    np.testing.assert_array_equal(rounded, run(quantized, tokens))
    # Seven products a block with weights of eight bits, some 1e-3 to 1e-2 each.
    assert 1e-4 < float(jnp.linalg.norm(rounded - whole) / jnp.linalg.norm(whole)) < 5e-2


def test_float16_is_computed_in_float32(tmp_path):
    folder = encoder_folder(tmp_path / "half", LLAMA)
    file = folder / "model.safetensors"
    half = {name: array.astype(np.float16) for name, array in load_file(file).items()}
    save_file(half, file, {"format": "pt"})
    assert load_encoder(folder)(jnp.arange(5)[None]).dtype == jnp.float32


@pytest.mark.parametrize(("change", "message"), [
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "positions that are not stretched"),
    ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "positions that are not stretched"),
    ({"hidden_act": "gelu"}, "Llama has 'silu'"),
    ({"attention_bias": True}, "has biases"),
    ({"num_hidden_layers": 2}, "more than 2 are needed"),
    ({"num_key_value_heads": 3}, "mend config.json"),
    ({"head_dim": 5}, "mend config.json"),
])  # fmt: skip
def test_what_is_not_here_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        build_encoder({**LLAMA, **change})


def test_both_spellings_of_theta_are_one():
    new = build_encoder({**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}).config
    assert new == build_encoder({**LLAMA, "rope_theta": 77.0}).config
    assert new.to_dict()["rope_theta"] == 77.0
