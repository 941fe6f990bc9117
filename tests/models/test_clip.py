"""CLIP's encoders of texts and images: parity with transformers, both rules for the end of a text, bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import parity_errors
from safetensors.numpy import load_file, save_file
from small_models import CLIP_TEXT, CLIP_VISION, encoder, encoder_folder

from models.clip_text import eos_positions
from models.encoders import build_encoder, load_encoder
from qvdjax.errors import UserError

PARITY = """
import json, sys
from pathlib import Path
import jax, numpy as np, torch, transformers
from models.encoders import load_encoder

cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
random, errors = np.random.default_rng(0), {}

def compare(name, ours, theirs):
    assert ours.dtype == np.float64
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    errors[name] = float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))

run = jax.jit(lambda m, *a, **k: m(*a, **k), static_argnames="output")
for name, config in cases.items():
    torch.manual_seed(0)
    kind = "Text" if "Text" in config["architectures"][0] else "Vision"
    parsed = getattr(transformers, f"CLIP{kind}Config")(**config)
    reference = getattr(transformers, config["architectures"][0])._from_config(parsed).double().eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 0
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * (1.5 / fan_in**0.5 if fan_in else 0.5))
    reference.save_pretrained(folder / name)
    model = load_encoder(folder / name)
    if kind == "Text":
        # Padding as CLIP has it: the token that ends a text, again and again.
        numbers = random.integers(3, 37, (2, 9))
        numbers[0, 4:], numbers[1, 7:] = 39, 39
        mask = np.arange(9) < np.array([[5], [8]])
        theirs = reference(torch.tensor(numbers), attention_mask=torch.tensor(mask).long())
        compare(f"{name}, masked", run(model, numbers, mask), theirs.last_hidden_state)
        theirs = reference(torch.tensor(numbers))
        compare(f"{name}, tokens", run(model, numbers), theirs.last_hidden_state)
        pooled = theirs.text_embeds if "Projection" in config["architectures"][0] else theirs.pooler_output
        compare(f"{name}, pooled", run(model, numbers, output="pooled"), pooled)
    else:
        pixels = random.standard_normal((2, 3, 8, 8))
        theirs = reference(torch.tensor(pixels), output_hidden_states=True)
        images = pixels.transpose(0, 2, 3, 1)
        compare(f"{name}, last", run(model, images), theirs.last_hidden_state)
        compare(f"{name}, penultimate", run(model, images, output="penultimate"), theirs.hidden_states[-2])
        pooled = theirs.image_embeds if "Projection" in config["architectures"][0] else theirs.pooler_output
        compare(f"{name}, pooled", run(model, images, output="pooled"), pooled)
print(json.dumps(errors))
"""


def test_parity_with_transformers(tmp_path):
    cases = {
        "text": CLIP_TEXT,
        "text, projected, old rule": {
            **CLIP_TEXT, "architectures": ["CLIPTextModelWithProjection"], "eos_token_id": 2, "hidden_act": "gelu",
        },
        "image": CLIP_VISION,
        "image, projected": {**CLIP_VISION, "architectures": ["CLIPVisionModelWithProjection"], "hidden_act": "gelu"},
    }  # fmt: skip
    errors = parity_errors(PARITY, cases, tmp_path)
    assert len(errors) == 12
    # All is float64 on both sides but the factor of quick GELU, the same decimal: rounding, far below 1e-6.
    assert max(errors.values()) <= 1e-6, errors


def test_where_a_text_ends():
    tokens = jnp.array([[5, 9, 2, 9], [9, 1, 1, 1]])
    assert eos_positions(tokens, 9).tolist() == [1, 0]
    assert eos_positions(tokens, 2).tolist() == [1, 0]  # the largest number
    assert eos_positions(jnp.array([[3, 2, 7]]), 2).tolist() == [2]
    assert eos_positions(jnp.array([[3, 6, 7]]), 6).tolist() == [1]


@pytest.mark.parametrize(("fields", "count"), [
    # openai/clip-vit-large-patch14, its texts; laion's ViT-H, its images with their projection.
    ({"model_type": "clip_text_model", "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
     123_060_480),
    ({"model_type": "clip_vision_model", "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32,
      "num_attention_heads": 16, "patch_size": 14, "projection_dim": 1024, "hidden_act": "gelu",
      "architectures": ["CLIPVisionModelWithProjection"]}, 632_076_800),
])  # fmt: skip
def test_parameter_counts_of_the_published_models(fields, count):
    model = jax.eval_shape(lambda: build_encoder(fields))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == count


def test_files_without_the_prefix_and_with_positions_are_read(tmp_path):
    folder = encoder_folder(tmp_path / "encoder", CLIP_TEXT)
    file = folder / "model.safetensors"
    before = jax.tree.leaves(load_encoder(folder))
    tensors = {name.removeprefix("text_model."): values for name, values in load_file(file).items()}
    save_file({**tensors, "embeddings.position_ids": np.arange(9)[None]}, file)
    for one, other in zip(before, jax.tree.leaves(load_encoder(folder)), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("config", "change", "message"), [
    (CLIP_TEXT, {"hidden_act": "relu"}, "hidden_act 'relu'; CLIP has quick_gelu or gelu"),
    (CLIP_TEXT, {"num_attention_heads": 5}, "no multiple of 5 heads"),
    (CLIP_TEXT, {"architectures": ["CLIPModel"]}, "architectures is .*'CLIPTextModel'"),
    (CLIP_TEXT, {"eos_token_id": [1, 2]}, "eos_token_id"),
    (CLIP_VISION, {"patch_size": [4, 4]}, "patch_size"),
])  # fmt: skip
def test_bad_configurations_are_said(tmp_path, config, change, message):
    folder = encoder_folder(tmp_path / "encoder", config)
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=message):
        load_encoder(folder)


def test_wrong_sizes_are_said():
    with pytest.raises(UserError, match="a text of 10 tokens; this encoder takes 9"):
        encoder(CLIP_TEXT)(jnp.zeros((1, 10), int))
    with pytest.raises(UserError, match=r"images .* do not fit this encoder; give \(batch, 8, 8, 3\)"):
        encoder(CLIP_VISION)(jnp.zeros((1, 8, 9, 3)))
