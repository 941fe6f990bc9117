"""score: each metric against a plain form of it, and no number where weights are missing or others."""

import hashlib
import json

import numpy as np
import pytest
import torch
from published_folders import clip_tokenizer
from safetensors.numpy import save_file
from small_models import CLIP_TEXT, CLIP_VISION, encoder

from experiments.cli.main import main
from experiments.video_metrics import fvd, lpips, score_videos, weights
from experiments.video_metrics.weights import WeightFile
from models.clip_pair import ClipPair
from qvdjax.checkpoint.loading import tensor_sources
from qvdjax.errors import UserError
from qvdjax.metrics import frechet_distance
from qvdjax.video import read_mp4, write_mp4

RANDOM = np.random.default_rng(0)
# CLIP's own.
MEAN, DEVIATION = np.array([[0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIPModel, as transformers lays it out."""
    folder = clip_tokenizer(tmp_path_factory.mktemp("clip") / "clip")
    text = {**CLIP_TEXT, "max_position_embeddings": 77, "architectures": ["CLIPTextModelWithProjection"]}
    vision = {**CLIP_VISION, "architectures": ["CLIPVisionModelWithProjection"]}
    tensors = {s.name: s.make() for config in (text, vision) for s in tensor_sources(encoder(config))}
    save_file({**tensors, "logit_scale": np.array(4.6, np.float32)}, folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 10, "text_config": text,
              "vision_config": vision}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    processor = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def videos(tmp_path):
    """Two folders of two videos; the first says its prompts."""
    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
        for prompt in ("a red cat", "a disc"):
            frames = RANDOM.integers(0, 255, (10, 8, 12, 3), np.uint8).repeat(8, axis=1).repeat(8, axis=2)
            path = tmp_path / name / f"{prompt}.mp4"
            write_mp4(path, frames, fps=8)
            path.with_suffix(".json").write_text(json.dumps({"prompt": prompt}))
    return tmp_path / "ours", tmp_path / "theirs"


@pytest.mark.slow  # imports transformers
def test_vectors_are_those_of_transformers(clip_folder):
    from transformers import CLIPModel

    theirs, ours = CLIPModel.from_pretrained(clip_folder).eval(), ClipPair.load(clip_folder)
    texts = ["a red cat", "a disc " * 60]
    images = RANDOM.integers(0, 255, (3, 8, 8, 3), np.uint8)
    numbers = torch.tensor(ours.tokenizer.encode(texts, 77).numbers).long()
    pixels = np.stack([(image / 255 - MEAN) / DEVIATION for image in images]).astype(np.float32)
    with torch.no_grad():
        out = theirs(input_ids=numbers, pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2)))
    # Both compute in float32; these are unit vectors.
    np.testing.assert_allclose(ours.of_texts(texts), out.text_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(ours.of_images(images), out.image_embeds.numpy(), atol=1e-5)


def test_clip_scores(clip_folder, videos):
    ours, _ = videos
    report = score_videos(ours, clip=clip_folder)
    pair = ClipPair.load(clip_folder)
    for prompt in ("a red cat", "a disc"):
        frames = pair.of_images(read_mp4(ours / f"{prompt}.mp4").frames)
        cosines = frames @ pair.of_texts([prompt])[0]
        assert report["scores"]["clip_similarity"]["per_video"][f"{prompt}.mp4"] == pytest.approx(cosines.mean())
        near = [one @ two for one, two in zip(frames[1:], frames[:-1])]
        assert report["scores"]["clip_temporal"]["per_video"][f"{prompt}.mp4"] == pytest.approx(np.mean(near), abs=1e-6)
    assert report["scores"].keys() == {"clip_similarity", "clip_temporal"}
    assert report["missing"].keys() == {"lpips", "fvd", "psnr", "ssim"}
    assert report["clip"] == pair.fingerprint


def reference_lpips(network, heads, one, other):
    """By PyTorch's own layers."""
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    pool = torch.nn.MaxPool2d(3, 2)
    total = 0.0
    streams = [
        ((torch.tensor(image).float() / 127.5 - 1 - shift) / scale).permute(2, 0, 1)[None] for image in (one, other)
    ]
    for lin, (number, stride, padding) in enumerate(((0, 4, 2), (3, 1, 2), (6, 1, 1), (8, 1, 1), (10, 1, 1))):
        if number in (3, 6):
            streams = [pool(x) for x in streams]
        weight, bias = network[f"features.{number}.weight"], network[f"features.{number}.bias"]
        streams = [torch.relu(torch.nn.functional.conv2d(x, weight, bias, stride, padding)) for x in streams]
        units = [x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10) for x in streams]
        squares = (units[0] - units[1]).pow(2)
        total += torch.nn.functional.conv2d(squares, heads[f"lin{lin}.model.1.weight"]).mean().item()
    return total


@pytest.fixture
def lpips_folder(tmp_path, monkeypatch):
    """Both files with random weights, whose hashes are taken for the published ones."""
    torch.manual_seed(0)
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
    network = {f"features.{n}.weight": torch.randn(s) * (2 / np.prod(s[1:])) ** 0.5 for n, s in shapes.items()}
    network |= {f"features.{n}.bias": 0.1 * torch.randn(s[0]) for n, s in shapes.items()}
    network["classifier.1.weight"] = torch.zeros(2)
    heads = {f"lin{i}.model.1.weight": torch.rand(1, s[0], 1, 1) for i, s in enumerate(shapes.values())}
    folder = tmp_path / "lpips"
    folder.mkdir()
    for attribute, name, tensors in (
        ("ALEXNET", "alexnet-owt-7be5be79.pth", network),
        ("LPIPS_HEADS", "alex.pth", heads),
    ):
        torch.save(tensors, folder / name)
        digest = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        monkeypatch.setattr(lpips, attribute, WeightFile((name,), digest, "the paper"))
    return folder, network, heads


def test_lpips_is_what_pytorchs_layers_give(lpips_folder):
    folder, network, heads = lpips_folder
    one, other = RANDOM.integers(0, 255, (2, 2, 70, 90, 3), np.uint8)
    measure = lpips.load_lpips(folder)
    expected = [reference_lpips(network, heads, *pair) for pair in zip(one, other, strict=True)]
    # Sums of up to 2400 products in float32, five layers deep.
    np.testing.assert_allclose(measure(one, other), expected, rtol=1e-4)
    assert measure(one, one).tolist() == [0, 0]
    with pytest.raises(UserError, match="at least 63 pixels"):
        measure(one[:, :40], other[:, :40])


class Features(torch.nn.Module):
    """Called as the published I3D is: means over the four quarters of a frame."""

    def forward(self, x, rescale: bool, resize: bool, return_features: bool):
        return torch.nn.functional.adaptive_avg_pool3d(x, [1, 2, 2]).flatten(1)


@pytest.fixture
def i3d_file(tmp_path, monkeypatch):
    torch.jit.script(Features()).save(tmp_path / "i3d_torchscript.pt")
    digest = hashlib.sha256((tmp_path / "i3d_torchscript.pt").read_bytes()).hexdigest()
    monkeypatch.setattr(fvd, "I3D", WeightFile(("i3d_torchscript.pt",), digest, "the paper"))
    return tmp_path / "i3d_torchscript.pt"


def test_frames_are_prepared_for_i3d(i3d_file):
    measure = fvd.load_i3d(i3d_file)
    video = np.zeros((10, 64, 128, 3), np.uint8)
    video[:, :, 64:] = 255  # the right half is white; of 224 x 448 the middle is seen
    features = measure(video).reshape(3, 2, 2)
    np.testing.assert_allclose(features[:, :, 0], -1, atol=0.02)  # bilinear between the halves
    np.testing.assert_allclose(features[:, :, 1], 1, atol=0.02)
    with pytest.raises(UserError, match="I3D takes 10 frames at least, not 9"):
        measure(video[:9])


def test_every_score_against_a_reference(clip_folder, lpips_folder, i3d_file, videos, tmp_path, capsys):
    ours, theirs = videos
    weights_of = ["--clip", clip_folder, "--lpips", lpips_folder[0], "--i3d", i3d_file]
    command = ["score", ours, "--reference", theirs, *weights_of, "-o", tmp_path / "scores.json"]
    assert main([str(part) for part in command]) == 0
    out = capsys.readouterr().out
    assert "fvd of 2 and 2 videos is biased upwards; take 256 or more" in out
    assert "not computed" not in out
    report = json.loads((tmp_path / "scores.json").read_text())
    assert report["missing"] == {}
    measure = fvd.load_i3d(i3d_file)
    features = [np.stack([measure(read_mp4(p).frames) for p in sorted(f.glob("*.mp4"))]) for f in videos]
    assert report["scores"]["fvd"] == pytest.approx(frechet_distance(*features))
    assert report["scores"]["psnr"]["mean"] < 20
    assert report["scores"]["lpips"]["per_video"].keys() == {"a red cat.mp4", "a disc.mp4"}


def test_what_lacks_its_weights_has_no_number(videos, capsys):
    assert main(["score", str(videos[0])]) == 0
    out = capsys.readouterr().out
    for name in ("clip_similarity", "clip_temporal", "lpips", "fvd", "psnr", "ssim"):
        assert f"{name}: not computed; it needs --" in out


@pytest.mark.parametrize("published", [weights.ALEXNET, weights.LPIPS_HEADS, weights.I3D])
def test_missing_and_other_weights_are_said(tmp_path, published):
    assert len(published.sha256) == 64
    with pytest.raises(UserError, match=f"holds no {published.names[0]}; download it from http"):
        published.checked(tmp_path)
    (tmp_path / published.names[-1]).write_bytes(b"something else")
    for given in (tmp_path, tmp_path / published.names[-1]):
        with pytest.raises(UserError, match="is not the file that the metric is defined by: its SHA-256 is"):
            published.checked(given)


def test_other_folders_are_said(clip_folder, i3d_file, videos, tmp_path):
    ours, theirs = videos
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no mp4"):
        score_videos(tmp_path / "empty")
    (theirs / "a disc.mp4").unlink()
    with pytest.raises(UserError, match="FVD compares sets of videos"):
        score_videos(ours, reference=theirs, i3d=i3d_file)
    with pytest.raises(UserError, match="lacks videos of") as error:
        score_videos(ours, reference=theirs)
    assert error.value.items == ("a disc.mp4",)
    with pytest.raises(UserError, match="does not exist"):
        score_videos(ours, clip=tmp_path / "nowhere")
    (ours / "a disc.json").write_text("[]")
    with pytest.raises(UserError, match="a disc.json says no prompt"):
        score_videos(ours, clip=clip_folder)
