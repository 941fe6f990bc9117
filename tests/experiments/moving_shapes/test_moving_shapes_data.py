"""Data: a pure function of (seed, step), on the device, as a grain stream and through a folder."""

import json

import grain
import jax
import numpy as np
import pytest

from experiments.moving_shapes import data
from experiments.moving_shapes.captions import WORDS, all_captions
from experiments.moving_shapes.oracle import score
from experiments.moving_shapes.train import pipeline
from experiments.moving_shapes.words import caption_contexts, embeddings
from experiments.training.latents import DataFolder

batch = jax.jit(data.batch, static_argnums=(2, 3))


def test_words_are_orthogonal():
    table = embeddings()
    assert table.shape == (len(WORDS), 64)
    assert (table @ table.T == 64 * np.eye(len(WORDS))).all()  # sums of +-1: exact


def test_contexts_are_the_pipelines():
    sentences = [str(caption) for caption in all_captions()]
    assert (pipeline().encode(sentences) == caption_contexts()).all()
    assert not pipeline().encode([""]).any()


def test_a_batch_depends_on_seed_and_step_alone():
    one = batch(0, 3, 8)
    assert one["latents"].shape == (8, 9, 8, 8, 12)
    assert one["context"].shape == (8, 8, 64)
    for other, same in ((batch(0, 3, 8), True), (batch(0, 4, 8), False), (batch(1, 3, 8), False)):
        assert bool((one["latents"] == other["latents"]).all()) == same
    # Rows are examples of one stream, however they are cut into batches.
    cut = [batch(0, step, 4) for step in (6, 7)]
    for name in one:
        assert (one[name] == np.concatenate([part[name] for part in cut])).all()


@pytest.mark.parametrize("family", ["wan", "animatediff"])
def test_examples_show_their_captions(family):
    own = pipeline(family)
    drawn = batch(11, 0, 64, own.frame_factor)
    videos = own.decode(drawn["latents"])
    for video, caption in zip(videos, np.asarray(drawn["caption"])):
        result = score(video, all_captions()[caption])
        assert result["color"] == result["shape"] == result["direction"] == 1.0


def test_captions_are_drawn_evenly():
    counts = np.bincount(batch(0, 0, 4096)["caption"], minlength=1152)
    # Poisson with mean 3.6: chi-squared over 1152 cells has mean 1151 and deviation 48; five deviations.
    expected = 4096 / 1152
    assert abs(((counts - expected) ** 2 / expected).sum() - 1151) < 5 * 48


def test_the_grain_stream_is_the_same_and_resumes():
    stream = data.stream(4)
    assert isinstance(stream, grain.MapDataset)
    one, rows = batch(4, 1, 4), [stream[i] for i in range(4, 8)]
    for name in one:
        assert (one[name] == np.stack([row[name] for row in rows])).all()
    iterator = iter(stream.batch(4).to_iter_dataset(grain.ReadOptions(num_threads=1)))
    next(iterator)
    state = iterator.get_state()
    again = iter(data.stream(4).batch(4).to_iter_dataset())
    again.set_state(state)
    assert (next(again)["latents"] == one["latents"]).all()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "clips"
    data.main([str(path), "--count", "20", "--seed", "2", "--shard", "8"])
    return path


def test_a_folder_holds_the_stream(written):
    read, drawn = DataFolder(written), batch(2, 0, 20)
    assert len(read) == 20
    assert sorted(file.name for file in written.glob("*.safetensors")) == [
        f"data-0000{shard}.safetensors" for shard in range(3)
    ]
    for row in (0, 7, 8, 19):
        for name in ("latents", "context"):
            assert (read[row][name] == drawn[name][row]).all()
    said = [str(all_captions()[row]) for row in drawn["caption"]]
    assert json.loads((written / "prompts.json").read_text()) == said
