"""sample below a limit of memory: what is chosen, that the same video comes out, and what is said if nothing fits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_folders import WAN_VAE, published_pipeline
from safetensors.numpy import load_file, save_file

import models
from experiments.sampling import memory_plan, sample_folder
from experiments.sampling.decoding import peak_bytes
from experiments.sampling.memory_plan import parse_limit
from models.pipeline_folder import PipelineFolder
from models.prompts import PromptEncoder
from models.vae_folders import build_vae
from qvdjax.errors import UserError
from qvdjax.nn import Param

OPTIONS = {"prompts": ["a red cat"], "seeds": range(6), "steps": 2, "frames": 2, "height": 16, "width": 24}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return published_pipeline(tmp_path_factory.mktemp("published") / "wan", "wan", WAN_VAE)


def test_every_component_says_what_it_holds_and_needs(pipeline, tmp_path):
    report = sample_folder(pipeline, tmp_path / "x.mp4", **OPTIONS | {"seeds": [1]})
    assert list(report["memory"]) == ["text_encoder", "denoiser", "vae"]
    bytes_of = lambda folder: sum(f.stat().st_size for f in folder.glob("*.safetensors"))  # noqa: E731
    for name, folder in (("text_encoder", "text_encoder"), ("denoiser", "transformer"), ("vae", "vae")):
        held = report["memory"][name]
        # Files hold headers too.
        assert 0.7 * bytes_of(pipeline / folder) < held["weight_bytes"] < bytes_of(pipeline / folder)
        assert held["peak_bytes"] > held["weight_bytes"]
    assert report["memory_plan"] is None
    assert report["videos"][0]["memory"] == report["memory"]


def test_the_encoder_is_planned_as_it_is_loaded(pipeline):
    encoder = PromptEncoder.open(PipelineFolder.open(pipeline))
    encoded = encoder.encode(["a cat"] * 3, dtype="bfloat16").encoder
    abstract = encoder.abstract("bfloat16")
    assert encoder.peak_bytes(abstract, 4) == encoded["peak_bytes"]
    variables = jax.tree.leaves(abstract, is_leaf=lambda node: isinstance(node, Param))
    assert jnp.dtype(jnp.bfloat16) in {variable.get_value().dtype for variable in variables}


def test_fewer_videos_at_once_are_the_same_videos(pipeline, tmp_path):
    random = np.random.default_rng(0)
    texts = {name: random.standard_normal((512, 24)).astype(np.float32) for name in ("context", "negative_context")}
    save_file(texts, tmp_path / "texts.safetensors")
    options = OPTIONS | {"prompts": None, "context_file": tmp_path / "texts.safetensors"}
    free = sample_folder(pipeline, tmp_path / "x.safetensors", **options)
    latents = [load_file(file)["latents"] for file in free["files"]]
    needed = free["memory"]["denoiser"]["peak_bytes"]
    assert (free["batch"], list(free["memory"])) == (6, ["denoiser"])
    limited = sample_folder(pipeline, tmp_path / "y.safetensors", **options, memory_limit=needed - 1)
    plan = limited["memory_plan"]
    assert (plan["batch"], plan["tiling"], plan["texts"]) == (3, None, None)
    assert limited["batch"] == 3
    assert limited["memory"]["denoiser"]["peak_bytes"] == plan["peak_bytes"]["denoiser"] < needed
    for file, before in zip(limited["files"], latents, strict=True):
        # Batches of another size are another program: float32 sums in another order.
        np.testing.assert_allclose(load_file(file)["latents"], before, atol=1e-3)
    same = sample_folder(pipeline, tmp_path / "z.safetensors", **options, memory_limit=needed)
    assert same["memory_plan"]["batch"] == 6


def test_fewer_texts_at_once(pipeline, tmp_path):
    encoder = PromptEncoder.open(PipelineFolder.open(pipeline))
    two, one = (encoder.peak_bytes(encoder.abstract(), count) for count in (2, 1))
    assert one < two
    options = OPTIONS | {"seeds": [1], "height": 4, "width": 6}
    report = sample_folder(pipeline, tmp_path / "x.safetensors", **options, memory_limit=two - 1)
    plan = report["memory_plan"]
    assert (plan["texts"], plan["texts_at_once"], plan["peak_bytes"]["text_encoder"]) == ("device", 1, one)
    assert report["memory"]["text_encoder"]["peak_bytes"] == one


def test_a_vae_in_tiles(pipeline, tmp_path, monkeypatch):
    vae = jax.eval_shape(lambda: build_vae(WAN_VAE))
    latents, tiles = (3, 64, 64, 5), models.Tiling((8, 8), (6, 6))
    whole, tiled = peak_bytes(vae, latents), peak_bytes(vae, latents, tiles)
    assert tiled < whole / 4  # a 64th of the frame, and the video twice
    monkeypatch.setattr(type(vae.config), "default_tiling", tiles)

    def chosen(limit):
        return memory_plan._around_latents(pipeline / "vae", latents, limit, decodes=True, pictures=None, dtype=None)

    assert chosen(whole) == (None, {"vae": whole})
    assert chosen(whole - 1) == (tiles, {"vae": tiled})
    tiling, least = chosen(1000)
    assert least["vae"] <= tiled
    assert tiling is not None


@pytest.mark.slow  # each shape of a tile is a program
def test_videos_of_a_limited_vae_are_written(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(type(jax.eval_shape(lambda: build_vae(WAN_VAE)).config), "default_tiling",
                        models.Tiling((8, 8), (6, 6)))  # fmt: skip
    options = OPTIONS | {"seeds": [1], "height": 48, "width": 40}
    free = sample_folder(pipeline, tmp_path / "x.mp4", **options)
    limit = free["memory"]["vae"]["peak_bytes"] - 1
    limited = sample_folder(pipeline, tmp_path / "y.mp4", **options, memory_limit=limit)
    assert limited["memory_plan"]["tiling"] == {"tile": (8, 8), "stride": (6, 6)}
    assert limited["videos"][0]["vae_tiling"]["tile"] == (8, 8)
    assert limited["memory"]["vae"]["peak_bytes"] == limited["memory_plan"]["peak_bytes"]["vae"] <= limit
    assert (tmp_path / "y.mp4").stat().st_size > 0


def test_where_nothing_fits_it_is_said_what_would(pipeline, tmp_path):
    with pytest.raises(UserError, match="nothing keeps this below 0.0977 MiB; .* would do") as error:
        sample_folder(pipeline, tmp_path / "x.mp4", **OPTIONS, memory_limit=102400)
    said = " ".join(error.value.items)
    assert all(
        words in said for words in ("for one text at a time", "for one video at a time", "in its smallest tiles")
    )
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="planned for one device; leave out --mesh"):
        sample_folder(pipeline, tmp_path / "x.mp4", **OPTIONS, memory_limit=10**9, mesh={"data": 1})


@pytest.mark.parametrize(("text", "bytes_"), [
    ("12GiB", 12 * 2**30), ("1.5 GB", 1_500_000_000), ("800M", 800_000_000), ("512 MiB", 2**29), ("4096", 4096),
    ("1tb", 10**12),
])  # fmt: skip
def test_limits_are_read(text, bytes_):
    assert parse_limit(text) == bytes_


@pytest.mark.parametrize("text", ["", "12 bananas", "-1GB", "GiB", "4iB", "1e9"])
def test_what_is_no_limit_is_said(text):
    with pytest.raises(UserError, match="is no size; write it like 12GiB"):
        parse_limit(text)
