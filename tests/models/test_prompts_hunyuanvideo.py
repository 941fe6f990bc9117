"""HunyuanVideo's prompts: as diffusers' pipeline encodes them, and what does not fit."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from parity import parity_errors
from published_folders import POOLED, published_pipeline
from small_models import encoder_folder

from models.pipeline_folder import PipelineFolder
from models.prompts import RULES, PromptEncoder
from qvdjax.errors import UserError

PARITY = """
import dataclasses, json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch, transformers
from diffusers import HunyuanVideoPipeline
from models import prompts
from models.pipeline_folder import PipelineFolder

(template, crop), folder = json.loads(sys.argv[1]), Path(sys.argv[2]) / "pipeline"
prompts.RULES["hunyuanvideo"] = dataclasses.replace(prompts.RULES["hunyuanvideo"], template=template, crop=crop)
texts = ["a red cat", "a  disc", "a cat disc " * 150]
ours = prompts.PromptEncoder.open(PipelineFolder.open(folder)).encode(texts, dtype="float64").tensors
tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"), pad_token="<pad>", padding_side="right")
pipeline = SimpleNamespace(
    tokenizer=tokenizer, tokenizer_2=transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
    text_encoder=transformers.LlamaModel.from_pretrained(folder / "text_encoder").double().eval(),
    text_encoder_2=transformers.CLIPTextModel.from_pretrained(folder / "text_encoder_2").double().eval(),
    _execution_device=torch.device("cpu"))
of = HunyuanVideoPipeline
with torch.no_grad():
    states, mask = of._get_llama_prompt_embeds(pipeline, texts, {"template": template, "crop_start": crop})
    pooled = of._get_clip_prompt_embeds(pipeline, texts)
states, mask, pooled = states.numpy(), mask.numpy(), pooled.numpy()
distance = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
assert ours["context"].shape == states.shape, (ours["context"].shape, states.shape)
kept = mask.astype(bool)
print(json.dumps({
    "mask": float((ours["encoder_attention_mask"] != mask).sum()), "padded": float((mask == 0).sum()),
    "padding": float(np.abs(ours["context"][~kept]).max()),
    "states": distance(ours["context"][kept], states[kept]), "pooled": distance(ours["pooled_projections"], pooled),
}))
"""


# The small tokenizer cuts the real request into far more tokens than are cut off.
SHORT = ("a s {} red", 2)


@pytest.mark.slow
def test_parity_with_diffusers_pipeline(tmp_path):
    published_pipeline(tmp_path / "pipeline", "hunyuanvideo")
    found = parity_errors(PARITY, SHORT, tmp_path)
    assert found["mask"] == 0
    assert found["padded"] > 300  # of two short texts; the third is longer than what is kept
    assert found["padding"] == 0
    # transformers has positions' angles in float32: 2e-5 off at the 258th token, of which attention leaves a part.
    assert found["states"] <= 1e-5, found
    assert found["pooled"] <= 1e-6, found


@pytest.mark.slow  # importing the pipeline takes seconds
def test_the_request_is_diffusers():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    rule = RULES["hunyuanvideo"]
    assert {"template": rule.template, "crop_start": rule.crop} == DEFAULT_PROMPT_TEMPLATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "hunyuanvideo", "hunyuanvideo")


@pytest.fixture
def short_request(monkeypatch):
    monkeypatch.setitem(RULES, "hunyuanvideo", dataclasses.replace(RULES["hunyuanvideo"], template=SHORT[0], crop=2))


def test_texts_become_what_the_model_takes(folder, short_request):
    def embeddings():  # of 40 tokens, 24 features each
        return [array for array in jax.live_arrays() if array.shape == (40, 24)]

    texts = PromptEncoder.open(PipelineFolder.open(folder)).encode(["a cat", "a red cat {}"])
    shapes = {name: array.shape for name, array in texts.tensors.items()}
    assert shapes == {"context": (2, 256, 24), "pooled_projections": (2, 12), "encoder_attention_mask": (2, 256)}
    mask = texts.tensors["encoder_attention_mask"]
    assert (np.diff(mask, axis=1) <= 0).all()
    assert 0 < mask[0].sum() < mask[1].sum() < 256
    assert not np.array_equal(texts.tensors["pooled_projections"][0], texts.tensors["pooled_projections"][1])
    assert not embeddings()  # both encoders are gone
    again = PromptEncoder.open(PipelineFolder.open(folder)).encode(["a red cat {}"], batch=1)
    # Other batches are other programs: float32 sums in another order.
    np.testing.assert_allclose(again.tensors["context"][0], texts.tensors["context"][1], atol=1e-4)


def changed(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pipeline")


def test_what_does_not_fit_is_said(folder, tmp_path):
    encoder = PromptEncoder.open(PipelineFolder.open(folder))
    with pytest.raises(UserError, match=r"makes one pass, which no other text guides; leave out the negative prompt"):
        encoder.encode(["a cat"], "a dog")
    other = changed(folder, tmp_path)
    shutil.rmtree(other / "text_encoder_2")
    with pytest.raises(UserError, match="lacks the folder text_encoder_2"):
        PromptEncoder.open(PipelineFolder.open(other))
    encoder_folder(other / "text_encoder_2", {**POOLED, "hidden_size": 24})
    with pytest.raises(UserError, match="text_encoder_2 is no CLIP encoder of 12 features"):
        PromptEncoder.open(PipelineFolder.open(other))
    shutil.rmtree(other / "text_encoder_2")
    encoder_folder(other / "text_encoder_2", {**POOLED, "vocab_size": 5})
    with pytest.raises(UserError, match=r"tokenizer_2 has more tokens than the 5 of .*text_encoder_2"):
        PromptEncoder.open(PipelineFolder.open(other)).encode(["a cat"])
