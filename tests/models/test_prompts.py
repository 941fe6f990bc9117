"""From prompts to embeddings as diffusers' pipelines make them, and what does not fit."""

import json
import shutil

import jax
import numpy as np
import pytest
from parity import parity_errors
from published_folders import PIECES, PIPELINES, published_pipeline
from small_models import UMT5, encoder_folder, unet_spatio_temporal

import models
from models import prompts
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder, clean_prompt
from qvdjax.errors import UserError
from qvdjax.parallel import make_mesh

PARITY = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
import numpy as np, torch, transformers
from diffusers import AnimateDiffPipeline, CogVideoXPipeline, WanPipeline
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder

(families, pieces), folder = json.loads(sys.argv[1]), Path(sys.argv[2])
texts = ["  a  red &amp;amp; cat\\n", "a cat disc " * 300]
errors = {}
for family in families:
    ours = PromptEncoder.open(PipelineFolder.open(folder / family)).encode(texts, "cats", dtype="float64")
    assert ours.tensors["context"].dtype == np.float64
    kind = {"wan": "UMT5EncoderModel", "cogvideox": "T5EncoderModel", "animatediff": "CLIPTextModel"}[family]
    encoder = getattr(transformers, kind).from_pretrained(folder / family / "text_encoder").double().eval()
    if family == "animatediff":
        tokenizer = transformers.CLIPTokenizer.from_pretrained(folder / family / "tokenizer")
    else:
        tokenizer = transformers.T5Tokenizer(vocab=[tuple(piece[:2]) for piece in pieces], extra_ids=0)
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, _execution_device=torch.device("cpu"))
    with torch.no_grad():
        if family == "animatediff":
            theirs, negative = AnimateDiffPipeline.encode_prompt(pipeline, texts, "cpu", 1, True, ["cats", "cats"])
        else:
            of = {"wan": WanPipeline, "cogvideox": CogVideoXPipeline}[family]
            length = {"wan": 512, "cogvideox": 7}[family]  # the small CogVideoX's; 226 in its published config
            theirs, negative = (
                of._get_t5_prompt_embeds(pipeline, prompt=given, max_sequence_length=length)
                for given in (texts, ["cats"]))
    for name, mine, other in (("", ours.tensors["context"], theirs), (", negative",
                              ours.tensors["negative_context"], negative[0])):
        other = other.numpy()
        assert mine.shape == other.shape, (family, mine.shape, other.shape)
        errors[family + name] = float(np.linalg.norm(mine - other) / np.linalg.norm(other))
print(json.dumps(errors))
"""


@pytest.mark.slow
def test_parity_with_diffusers_pipelines(tmp_path):
    families = [family for family in PIPELINES if family != "hunyuanvideo"]
    for family in families:
        published_pipeline(tmp_path / family, family)
    errors = parity_errors(PARITY, [families, PIECES], tmp_path)
    assert len(errors) == 6
    # transformers takes the mean square of T5's norms in float32: 6e-8 each, a few times more after three blocks.
    assert max(errors.values()) <= 1e-6, errors


def test_the_lengths_of_published_texts():
    lengths = {family: models.parse_config({"_class_name": name}).text_tokens for family, name in (
        ("wan", "WanTransformer3DModel"), ("cogvideox", "CogVideoXTransformer3DModel"),
        ("animatediff", "UNetMotionModel"), ("modelscope", "UNet3DConditionModel"),
        ("hunyuanvideo", "HunyuanVideoTransformer3DModel"),
    )}  # fmt: skip
    assert lengths == {"wan": 512, "cogvideox": 226, "animatediff": 77, "modelscope": 77, "hunyuanvideo": 256}
    assert set(lengths) == set(prompts.RULES)


CLEANED = {
    "a cat": "a cat", "  a\t cat\n\n": "a cat", "a &amp;lt;b&amp;gt; cat": "a <b> cat",
    "&nbsp;a&#39;s\u3000cat\u2028": "a's cat", "": "", "a\x1ccat": "a\x1ccat", "\x1c a \x85": "a",
}  # fmt: skip


@pytest.mark.parametrize("text", CLEANED)
def test_prompts_are_cleaned(text, monkeypatch):
    monkeypatch.setattr(prompts, "ftfy", None)
    assert clean_prompt(text) == CLEANED[text]


@pytest.mark.slow  # importing the pipeline takes seconds
def test_prompts_are_cleaned_as_diffusers_does():
    from diffusers.pipelines.wan.pipeline_wan import prompt_clean

    assert {text: clean_prompt(text) for text in CLEANED} == {text: prompt_clean(text) for text in CLEANED}


def test_broken_encodings_are_mended_where_a_package_can(monkeypatch):
    class Package:
        def fix_text(text):
            return text.replace("schÃ¶n", "schön")

    monkeypatch.setattr(prompts, "ftfy", Package)
    assert clean_prompt(" schÃ¶n &lt;") == "schön <"


@pytest.fixture(scope="module")
def wan_folder(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan")


def test_memory_is_free_after_encoding(wan_folder):
    def embeddings():  # of 40 tokens, 24 features each
        return [array for array in jax.live_arrays() if array.shape == (40, 24)]

    encoder = PromptEncoder.open(PipelineFolder.open(wan_folder))
    report = []
    texts = encoder.encode(
        ["a cat", "a red cat"], progress=lambda stage, done, total: report.append((stage, len(embeddings()), done))
    )
    assert [entry for entry in report if entry[0] == "encoding"] == [("encoding", 1, 3)]
    assert embeddings() == []
    whole, (first, second) = texts.tensors["context"], ((3, 4, 1), (3, 5, 4, 1))
    for row, numbers in zip(whole, (first, second), strict=True):
        assert (np.abs(row).max(axis=1) > 0).tolist() == [True] * len(numbers) + [False] * (512 - len(numbers))


def test_embeddings_do_not_depend_on_the_devices(wan_folder):
    encoder, mesh = PromptEncoder.open(PipelineFolder.open(wan_folder)), make_mesh({"fsdp": 2, "tensor": 2})
    alone = encoder.encode(["a red cat"])
    with jax.set_mesh(mesh):
        spread = encoder.encode(["a red cat"], mesh=mesh)
    # Other orders of float32 sums, on numbers of size 1 and through three blocks.
    np.testing.assert_allclose(spread.tensors["context"], alone.tensors["context"], atol=1e-4)


def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "pipeline")


def without(name):
    return lambda folder: shutil.rmtree(folder / name)


def another_encoder(**fields):
    def change(folder):
        shutil.rmtree(folder / "text_encoder")
        encoder_folder(folder / "text_encoder", {**UMT5, **fields})

    return change


def index(**entries):
    def change(folder):
        held = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**held, **entries}))

    return change


def stable_video_diffusion(folder):
    shutil.rmtree(folder / "transformer")
    models.save(unet_spatio_temporal(), folder / "transformer")


@pytest.mark.parametrize(("change", "message"), [
    (another_encoder(d_model=32), "text_encoder makes embeddings of 32 features, the model in .*transformer takes 24"),
    (another_encoder(model_type="t5"), "of the kind t5, and the texts of wan are encoded by umt5"),
    (without("text_encoder"), "lacks the folder text_encoder, of its UMT5EncoderModel; download it too"),
    (without("tokenizer"), "lacks the folder tokenizer"),
    (without("transformer"), "lacks the folder transformer"),
    (index(text_encoder=[None, None]), "names no text_encoder; it names .*tokenizer"),
    (index(transformer=[None, None]), "names no transformer"),
    (index(transformer_2=["diffusers", "WanTransformer3DModel"]), "two transformers that share the steps"),
    (stable_video_diffusion, "what encodes the prompts of stable-video-diffusion is not here; sample .*--context"),
])  # fmt: skip
def test_what_does_not_fit_is_said(wan_folder, tmp_path, change, message):
    folder = copied(wan_folder, tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message):
        PromptEncoder.open(PipelineFolder.open(folder))


def test_a_tokenizer_of_more_tokens_is_said(wan_folder, tmp_path):
    folder = copied(wan_folder, tmp_path)
    another_encoder(vocab_size=4)(folder)
    with pytest.raises(UserError, match=r"tokenizer has more tokens than the 4 of .*text_encoder"):
        PromptEncoder.open(PipelineFolder.open(folder)).encode(["a cat"])


def test_a_clip_of_fewer_positions_is_said(tmp_path):
    folder = published_pipeline(tmp_path / "pipeline", "animatediff")
    config = {**PIPELINES["animatediff"][2], "max_position_embeddings": 9}
    shutil.rmtree(folder / "text_encoder")
    encoder_folder(folder / "text_encoder", config)
    with pytest.raises(UserError, match="takes 9 tokens, texts of animatediff have 77"):
        PromptEncoder.open(PipelineFolder.open(folder))


def test_a_folder_that_is_no_pipeline_is_said(wan_folder, tmp_path):
    with pytest.raises(UserError, match="holds no model_index.json; name the folder of a whole pipeline"):
        PipelineFolder.open(wan_folder / "transformer")
    with pytest.raises(UserError, match="does not exist"):
        PipelineFolder.open(tmp_path / "nowhere")
