"""The word table, the folding of pixels, and the files that hold them."""

import dataclasses
import json

import numpy as np
import pytest
import small_models
from safetensors.numpy import load_file, save_file

from models.pipeline import FILE, WORD_TABLE, Pipeline, copy_pipeline, side_files
from qvdjax.diffusion import DDIM, DPMSolverSDE, FlowMatchEuler, UniPCFlow
from qvdjax.errors import UserError

WORDS = ("a", "red", "disc", "moving", "left")


@pytest.fixture
def pipeline():
    sizes = {"width": 5, "channels": 27, "factor": 3}
    return small_models.pipeline(WORDS, 6, **sizes, steps=20, negative_prompt="a disc")


def test_load_is_the_inverse_of_save(pipeline, tmp_path):
    pipeline.save(tmp_path)
    loaded = Pipeline.load(tmp_path)
    for field in dataclasses.fields(Pipeline):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(pipeline, field.name))
    assert sorted(path.name for path in tmp_path.iterdir()) == [FILE, WORD_TABLE]
    assert loaded.latents_shape == (3, 4, 5, 27)


def test_files_are_as_documented(pipeline, tmp_path):
    pipeline.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text()) == {
        "format": "qvdjax-pipeline",
        "version": 1,
        "context": {"kind": "word_table", "file": "word_table.safetensors", "tokens": 8},
        "latents": {"frames": 3, "height": 4, "width": 5, "channels": 27},
        "decoder": {"kind": "depth_to_space", "factor": 3},
        "solver": {"name": "unipc", "shift": 3.0, "steps": 20, "guidance_scale": 4.0},
        "fps": 8.0,
        "negative_prompt": "a disc",
    }
    np.testing.assert_array_equal(load_file(tmp_path / WORD_TABLE)["embeddings"], pipeline.embeddings)


def test_copy(pipeline, tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    assert copy_pipeline(source, target) is False
    assert side_files(source) == {}
    pipeline.save(source)
    assert copy_pipeline(source, target) is True
    assert side_files(source) == {FILE: source / FILE, WORD_TABLE: source / WORD_TABLE}
    assert (target / FILE).read_bytes() == (source / FILE).read_bytes()
    assert (target / WORD_TABLE).read_bytes() == (source / WORD_TABLE).read_bytes()


def test_encode(pipeline):
    context = pipeline.encode(["a Red disc, moving left.", "", "disc disc"])
    assert context.shape == (3, 8, 6)
    assert context.dtype == np.float32
    np.testing.assert_array_equal(context[0, :5], pipeline.embeddings)
    assert not context[0, 5:].any()
    assert not context[1].any()
    np.testing.assert_array_equal(context[2, :2], pipeline.embeddings[[2, 2]])


def test_a_latent_position_holds_its_block_of_pixels(pipeline):
    latents = np.random.default_rng(1).uniform(-1, 1, (2, 3, 4, 5, 27)).astype(np.float32)
    video = pipeline.decode(latents)
    assert video.shape == (2, 3, 12, 15, 3)
    assert video.dtype == np.float32
    for frame, row, column, p, q, color in [(0, 0, 0, 0, 0, 0), (2, 3, 4, 2, 1, 2), (1, 2, 0, 1, 2, 1)]:
        pixel = video[1, frame, 3 * row + p, 3 * column + q, color]
        expected = latents[1, frame, row, column, (3 * p + q) * 3 + color] / 2 + 0.5
        assert pixel == expected


def test_fold_is_the_inverse_of_decode_and_decode_clips(pipeline):
    video = np.random.default_rng(2).uniform(0, 1, (2, 3, 12, 15, 3)).astype(np.float32)
    # 2 * x - 1 and x / 2 + 0.5 each round once in float32 at size 1.
    np.testing.assert_allclose(pipeline.decode(pipeline.fold(video)), video, atol=2e-7)
    outside = pipeline.decode(np.full((1, 1, 1, 1, 27), 1.5))
    assert (outside == 1).all()


def test_enlarged_videos(pipeline, tmp_path):
    large = dataclasses.replace(pipeline, enlarge=2)
    large.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["decoder"] == {
        "kind": "depth_to_space", "factor": 3, "enlarge": 2,
    }  # fmt: skip
    assert Pipeline.load(tmp_path).enlarge == 2
    video = np.random.default_rng(2).uniform(0, 1, (1, 2, 12, 15, 3)).astype(np.float32)
    shown = large.decode(pipeline.fold(video))
    assert shown.shape == (1, 2, 24, 30, 3)
    # Halves of a pixel lie a quarter of a pixel from its centre: three parts of it, one of the neighbour's; the edges
    # have no neighbour. Float32 rounding of numbers up to 1.
    np.testing.assert_allclose(shown[0, 0, 0, 0], video[0, 0, 0, 0], atol=1e-6)
    row = 0.75 * video[0, 1, 4] + 0.25 * video[0, 1, 3]  # of pixel row 4, the upper half
    np.testing.assert_allclose(shown[0, 1, 8, 5], 0.75 * row[2] + 0.25 * row[3], atol=1e-6)
    # Means of the blocks that interpolation made of a plain picture are the picture.
    plain = np.broadcast_to(video[:, :, :1, :1], (1, 2, 24, 30, 3))
    np.testing.assert_allclose(large.decode(large.fold(plain)), plain, atol=1e-6)
    with pytest.raises(UserError, match="multiples of 6"):
        large.fold(np.zeros((1, 2, 12, 15, 3)))


def test_make_solver(pipeline):
    assert pipeline.make_solver() == UniPCFlow(3.0)
    assert pipeline.make_solver("euler") == FlowMatchEuler(3.0)
    assert pipeline.make_solver(shift=5.0, sigma_grid="diffusers") == UniPCFlow(5.0, sigma_grid="diffusers")
    with pytest.raises(UserError, match="'ddim' is for models of variance-preserving diffusion.*unipc, euler"):
        pipeline.make_solver("ddim")


def test_a_solver_without_a_shift_and_with_options_of_its_own(pipeline, tmp_path):
    options = {"snr_shift_scale": 1.0, "timestep_spacing": "leading"}
    changed_solver = dataclasses.replace(pipeline, solver="ddim", shift=None, solver_options=options)
    changed_solver.save(tmp_path)
    expected = {"name": "ddim", **options, "steps": 20, "guidance_scale": 4.0}
    assert json.loads((tmp_path / FILE).read_text())["solver"] == expected
    loaded = Pipeline.load(tmp_path)
    assert loaded.make_solver() == DDIM(**options)
    assert loaded.make_solver("dpm-sde") == DPMSolverSDE(**options)  # the schedule the model was trained on
    with pytest.raises(UserError, match="no such option.*shift"):
        loaded.make_solver(shift=3.0)
    with pytest.raises(UserError, match="'unipc' is for models of flow diffusion"):
        loaded.make_solver("unipc")


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ("a red cube moving sideways", r"2: cube, sideways.*it knows a, red, disc, moving, left"),
        ("a " * 9, "has 9 words.*at most 8"),
    ],
)
def test_prompts_it_cannot_encode(pipeline, prompt, named):
    with pytest.raises(UserError, match=named):
        pipeline.encode([prompt])


def test_frames_folded_into_one(pipeline, tmp_path):
    folded = dataclasses.replace(pipeline, frame_factor=2, channels=54)
    folded.save(tmp_path)
    assert json.loads((tmp_path / FILE).read_text())["decoder"] == {
        "kind": "depth_to_space", "factor": 3, "frame_factor": 2,
    }  # fmt: skip
    assert Pipeline.load(tmp_path).frame_factor == 2
    video = np.random.default_rng(2).uniform(0, 1, (1, 4, 12, 15, 3)).astype(np.float32)
    latents = folded.fold(video)
    # The second frame of each pair is the second half of the channels.
    np.testing.assert_array_equal(latents[..., 27:], pipeline.fold(video[:, 1::2]))
    # 2 * x - 1 and x / 2 + 0.5 each round once in float32 at size 1.
    np.testing.assert_allclose(folded.decode(latents), video, atol=2e-7)
    with pytest.raises(UserError, match="3 frames cannot be folded.*multiple of 2"):
        folded.fold(video[:, :3])
    with pytest.raises(UserError, match="54 channels do not hold 3 x 3 RGB pixels of 3 frames"):
        dataclasses.replace(folded, frame_factor=3)


def test_arrays_of_the_wrong_shape(pipeline):
    with pytest.raises(UserError, match=r"\(3, 4, 5, 27\) is not \(batch"):
        pipeline.decode(np.zeros((3, 4, 5, 27)))
    with pytest.raises(UserError, match="height, width, 27"):
        pipeline.decode(np.zeros((1, 3, 4, 5, 26)))
    with pytest.raises(UserError, match="12 x 16 pixels.*multiples of 3"):
        pipeline.fold(np.zeros((1, 3, 12, 16, 3)))


def changed(value, path, new):
    """A copy of a JSON object with the field at a dotted path replaced; `...` deletes it."""
    head, _, rest = path.partition(".")
    value = dict(value)
    if rest:
        value[head] = changed(value[head], rest, new)
    elif new is ...:
        del value[head]
    else:
        value[head] = new
    return value


@pytest.mark.parametrize(
    ("path", "new", "named"),
    [
        ("format", "something", "no qvdjax-pipeline file of version 1"),
        ("version", 2, "no qvdjax-pipeline file of version 1"),
        ("fps", ..., "lacks 'fps'"),
        ("fps", 0, "fps is 0"),
        ("fps", True, "'fps' is True"),
        ("solver.shift", "3", "'solver.shift' is '3'.*finite number"),
        ("solver.shift", float("nan"), "'solver.shift' is nan"),
        ("solver.shift", -1.0, "shift is -1.0"),
        ("solver.name", "heun", "no solver called 'heun'"),
        ("solver.name", "ddim", "'ddim' has no such option.*shift"),
        ("solver.shift", ..., "lacks 'solver.shift'"),
        ("solver.sigma_grid", ["original"], "sigma grid is"),
        ("solver.order", 2.0, "order is 2.0"),
        ("solver.orders", 2, "no such option.*orders"),
        ("solver.steps", 0, "'solver.steps' is 0"),
        ("latents.frames", 2.5, "'latents.frames' is 2.5.*whole number"),
        ("latents.channels", 12, "12 channels do not hold 3 x 3"),
        ("latents.depth", 1, "unknown fields.*latents.depth"),
        ("context.kind", "t5", "'context.kind' is 't5'.*'word_table'"),
        ("context", 3, "'context' is 3"),
        ("context.file", "none.safetensors", "none.safetensors"),
        ("context.file", "../word_table.safetensors", "file of the same folder"),
        ("decoder.kind", "vae", "'decoder.kind' is 'vae'"),
    ],
)
def test_damaged_settings_are_named(pipeline, tmp_path, path, new, named):
    pipeline.save(tmp_path)
    file = tmp_path / FILE
    file.write_text(json.dumps(changed(json.loads(file.read_text()), path, new)))
    with pytest.raises(UserError, match=named):
        Pipeline.load(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "metadata", "named"),
    [
        ({"embeddings": np.zeros((5, 6), np.float32)}, {}, "no list of words"),
        ({"embeddings": np.zeros((5, 6), np.float32)}, {"words": "[1, 2"}, "no list of words"),
        (
            {"embeddings": np.zeros((4, 6), np.float32)},
            {"words": json.dumps(WORDS)},
            "5 words and embeddings",
        ),
        ({"embeddings": np.full((5, 6), np.nan, np.float32)}, {"words": json.dumps(WORDS)}, "NaN"),
        ({"vectors": np.zeros((5, 6), np.float32)}, {"words": json.dumps(WORDS)}, "embeddings"),
    ],
)
def test_damaged_word_tables_are_named(pipeline, tmp_path, tensors, metadata, named):
    pipeline.save(tmp_path)
    save_file(tensors, tmp_path / WORD_TABLE, metadata=metadata)
    with pytest.raises(UserError, match=named):
        Pipeline.load(tmp_path)


def test_a_folder_without_a_pipeline(tmp_path):
    with pytest.raises(UserError, match=r"holds no pipeline\.json"):
        Pipeline.load(tmp_path)


def test_an_unwritable_folder(pipeline, tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        pipeline.save(tmp_path / "missing")
