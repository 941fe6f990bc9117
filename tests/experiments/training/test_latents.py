"""Folders of latents: what is written is read, in an order of (seed, step) alone, and damage is named."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from experiments.training import latents
from experiments.training.latents import DataFolder, write_folder
from qvdjax.errors import UserError


def examples(count):
    """Latents of 2 frames of 3 x 4 with 5 channels, contexts of 6 tokens of 7; each example its own."""
    random = np.random.default_rng(0)
    for number in range(count):
        yield {
            "latents": random.standard_normal((2, 3, 4, 5), np.float32),
            "context": random.standard_normal((6, 7), np.float32),
            "prompt": f"clip {number}",
        }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "clips"
    write_folder(path, examples(20), shard=8)
    return path


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def test_what_was_written_is_read(written):
    folder = DataFolder(written)
    assert len(folder) == 20
    assert folder.shapes == {"latents": (2, 3, 4, 5), "context": (6, 7)}
    for number, example in enumerate(examples(20)):
        for name in ("latents", "context"):
            np.testing.assert_array_equal(folder[number][name], example[name])
    assert json.loads((written / "prompts.json").read_text())[19] == "clip 19"


def test_batches_depend_on_seed_and_step_alone(written):
    stream, again = (latents.stream(written, seed=5, size=4) for _ in range(2))
    assert (stream[7]["latents"] == again[7]["latents"]).all()
    assert (stream[7]["latents"] != latents.stream(written, seed=6, size=4)[7]["latents"]).any()
    epoch = np.concatenate([stream[k]["latents"] for k in range(5)])  # 20 clips, each once
    assert len(np.unique(epoch.reshape(20, -1), axis=0)) == 20


def test_a_process_reads_its_rows_of_the_same_batches(written, monkeypatch):
    whole = latents.stream(written, seed=5, size=6)
    rows = [1, 2, 5]
    part, read = latents.stream(written, seed=5, size=6, rows=rows), []
    one = DataFolder.__getitem__
    monkeypatch.setattr(DataFolder, "__getitem__", lambda self, index: read.append(index) or one(self, index))
    found = part[4]
    assert len(read) == len(rows)  # the others are not touched
    for name in ("latents", "context"):
        np.testing.assert_array_equal(found[name], whole[4][name][rows])


def test_a_folder_is_not_overwritten(written):
    with pytest.raises(UserError, match="not empty"):
        write_folder(written, [])


def test_no_examples_are_refused(tmp_path):
    with pytest.raises(UserError, match="no examples"):
        write_folder(tmp_path / "empty", [])
    assert not list(tmp_path.iterdir())


def test_an_interrupted_writer_leaves_nothing(tmp_path):
    def interrupted():
        yield from examples(10)
        assert list(tmp_path.glob(".clips.partial-*/data-00001.safetensors"))  # there is something to leave
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "clips", interrupted(), shard=4)
    assert not list(tmp_path.iterdir())


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="clips cannot be written"):
        write_folder(tmp_path / "file" / "clips", examples(1))


@pytest.mark.parametrize("content", [None, "{", "[]", '{"format": "other"}'])
def test_a_folder_without_a_manifest_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / latents.MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        DataFolder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("context"),
        lambda manifest: manifest.pop("shards"),
        lambda manifest: manifest.update(latents="wide"),
        lambda manifest: manifest["shards"][0].pop("count"),
    ],
)
def test_a_manifest_that_lacks_something_is_refused(copy, change):
    file = copy / latents.MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json lacks or misspells"):
        DataFolder(copy)


def test_missing_and_truncated_shards_are_named(copy):
    shard = copy / "data-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])
    with pytest.raises(UserError, match="data-00001"):
        DataFolder(copy)[9]
    shard.unlink()
    with pytest.raises(UserError, match="data-00001"):
        DataFolder(copy)


@pytest.mark.parametrize("damage", ["nan", "shape", "short", "name"])
def test_examples_that_are_not_what_the_manifest_says_are_named(copy, damage):
    shard = copy / "data-00001.safetensors"
    tensors = load_file(shard)
    if damage == "nan":
        tensors["latents"][1, 0, 0, 0, 0] = np.nan
    elif damage == "shape":
        tensors["context"] = tensors["context"][:, :5].copy()
    elif damage == "short":
        tensors = {name: value[:1].copy() for name, value in tensors.items()}
    else:
        tensors["text"] = tensors.pop("context")
    save_file(tensors, shard)
    with pytest.raises(UserError, match="data-00001"):
        DataFolder(copy)[9]  # row 1 of the second shard
    batches = latents.stream(copy, seed=0, size=20)
    with pytest.raises(UserError, match="data-00001"):
        batches[0]  # no other error on the way through grain
