"""Model folders: one file or shards with an index, what is refused, and writing that is all or nothing."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qvdjax.checkpoint import CheckpointFolder, TensorSource, new_folder, write_file, write_folder
from qvdjax.checkpoint.folder import INDEX, WEIGHTS
from qvdjax.errors import UserError

CONFIG = {"_class_name": "Something", "width": 3}


def tensors(count=5, seed=0):
    rng = np.random.default_rng(seed)
    values = {f"blocks.{i}.weight": rng.standard_normal((4, i + 1)).astype(np.float32) for i in range(count)}
    return values, [TensorSource(k, v.shape, v.dtype, lambda v=v: v) for k, v in values.items()]


def same(folder, values):
    assert set(folder.keys) == set(values)
    for key, value in values.items():
        np.testing.assert_array_equal(folder.read(key), value)


@pytest.fixture
def sharded(tmp_path):
    """A folder of three shards and its values."""
    values, sources = tensors()
    write_folder(tmp_path / "model", CONFIG, sources, max_shard_bytes=100)
    return tmp_path / "model", values


@pytest.fixture
def single(tmp_path):
    """A folder of one file and its values."""
    values, sources = tensors()
    write_folder(tmp_path / "model", CONFIG, sources)
    return tmp_path / "model", values


def test_a_folder_of_one_file(single):
    path, values = single
    assert sorted(os.listdir(path)) == ["config.json", WEIGHTS]
    folder = CheckpointFolder.open(path)
    same(folder, values)
    assert folder.config == CONFIG
    assert folder.nbytes == sum(v.nbytes for v in values.values())
    assert oct(path.stat().st_mode & 0o777) == oct(0o777 & ~current_umask())


def current_umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_folder_of_shards_has_the_index_that_diffusers_writes(sharded):
    path, values = sharded
    # Sizes 16, 32, 48, 64, 80 bytes, at most 100 a file, in order: 96, then 64, then 80.
    shards = [f"diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(os.listdir(path)) == ["config.json", *shards, INDEX]
    index = json.loads((path / INDEX).read_text())
    assert index["metadata"] == {"total_size": 240}
    assert list(index["weight_map"].values()) == [shards[0]] * 3 + shards[1:]
    same(CheckpointFolder.open(path), values)


@settings(max_examples=30)  # each example writes several files through to the disk
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 200))
def test_no_shard_is_larger_than_the_limit_unless_one_tensor_is(tmp_path_factory, sizes, limit):
    path = tmp_path_factory.mktemp("shards") / "model"
    values = {f"t{i}": np.full(size, i % 100, np.int8) for i, size in enumerate(sizes)}
    sources = [TensorSource(k, v.shape, v.dtype, lambda v=v: v) for k, v in values.items()]
    write_folder(path, CONFIG, sources, max_shard_bytes=limit)
    folder = CheckpointFolder.open(path)
    same(folder, values)
    for file in set(folder.files.values()):
        assert sum(t.nbytes for t in file.tensors.values()) <= limit or len(file.tensors) == 1


def test_side_files_come_along_and_progress_is_told(tmp_path):
    values, sources = tensors()
    (tmp_path / "words").write_bytes(b"abc")
    told = []
    side_files = {"pipeline.json": b"{}", "words.bin": tmp_path / "words"}
    progress = lambda *state: told.append(state)  # noqa: E731
    write_folder(tmp_path / "model", CONFIG, sources, side_files=side_files, progress=progress)
    assert (tmp_path / "model" / "pipeline.json").read_bytes() == b"{}"
    assert (tmp_path / "model" / "words.bin").read_bytes() == b"abc"
    assert [done for _, done, _ in told] == list(np.cumsum([v.nbytes for v in values.values()]))
    assert told[-1] == ("writing", 240, 240)


# --- what is refused when reading


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        CheckpointFolder.open(tmp_path / "none")
    with pytest.raises(UserError, match="is empty"):
        CheckpointFolder.open(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a model folder"):
        CheckpointFolder.open(tmp_path / "file")


def test_a_missing_config_is_refused_unless_it_is_not_needed(single):
    path, values = single
    (path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        CheckpointFolder.open(path)
    same(CheckpointFolder.open(path, require_config=False), values)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_config_is_refused(single, content):
    path, _ = single
    (path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json"):
        CheckpointFolder.open(path)


def test_missing_weights_are_refused_with_what_is_there_instead(single):
    path, _ = single
    (path / WEIGHTS).rename(path / "model.ckpt")
    with pytest.raises(UserError, match=r"model\.ckpt.*qvdjax convert"):
        CheckpointFolder.open(path)
    (path / "model.ckpt").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        CheckpointFolder.open(path)


def test_a_missing_shard_is_refused(sharded):
    path, _ = sharded
    (path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match="lacks shards") as error:
        CheckpointFolder.open(path)
    assert error.value.items == ("diffusion_pytorch_model-00002-of-00003.safetensors",)


def test_a_corrupt_shard_is_refused(sharded):
    path, _ = sharded
    shard = path / "diffusion_pytorch_model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="00002-of-00003.safetensors is truncated"):
        CheckpointFolder.open(path)


def test_a_key_in_two_shards_is_refused(sharded):
    path, _ = sharded
    twice = np.zeros((4, 4), np.float32)
    write_file(
        path / "diffusion_pytorch_model-00003-of-00003.safetensors",
        [TensorSource(f"blocks.{i}.weight", (4, 4), twice.dtype, lambda: twice) for i in (3, 4)],
    )
    with pytest.raises(UserError, match="more than one shard") as error:
        CheckpointFolder.open(path)
    assert error.value.items == ("blocks.3.weight",)


def edit_index(path, change):
    index = json.loads((path / INDEX).read_text())
    change(index)
    (path / INDEX).write_text(json.dumps(index))


INDEX_CHANGES = {
    "a key too few": (lambda index: index["weight_map"].pop("blocks.1.weight"), "not in the index"),
    "a key too many": (
        lambda index: index["weight_map"].update(x="diffusion_pytorch_model-00001-of-00003.safetensors"),
        "x (not in",
    ),
    "a key in the wrong shard": (
        lambda index: index["weight_map"].update(
            {"blocks.0.weight": "diffusion_pytorch_model-00003-of-00003.safetensors"}
        ),
        "blocks.0.weight (not in",
    ),
    "no weight_map": (lambda index: index.pop("weight_map"), "no weight_map"),
    "a file name that is none": (
        lambda index: index["weight_map"].update({"blocks.0.weight": 3}),
        "no weight_map",
    ),
    "a path out of the folder": (
        lambda index: index["weight_map"].update({"blocks.0.weight": "../x.safetensors"}),
        "no weight_map",
    ),
}


@pytest.mark.parametrize("case", INDEX_CHANGES)
def test_an_index_that_lies_is_refused(sharded, case):
    path, _ = sharded
    change, words = INDEX_CHANGES[case]
    edit_index(path, change)
    with pytest.raises(UserError) as error:
        CheckpointFolder.open(path)
    assert words in str(error.value)


def test_both_a_file_and_an_index_are_refused(sharded):
    path, _ = sharded
    write_file(path / WEIGHTS, tensors()[1])
    with pytest.raises(UserError, match="holds both"):
        CheckpointFolder.open(path)


# --- what is refused when writing, and what is left behind


def test_a_target_with_content_is_refused_and_an_empty_one_is_taken(tmp_path):
    values, sources = tensors()
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "empty", CONFIG, sources)
    same(CheckpointFolder.open(tmp_path / "empty"), values)
    with pytest.raises(UserError, match="not empty"):
        write_folder(tmp_path / "empty", CONFIG, sources)
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is no folder"):
        write_folder(tmp_path / "file", CONFIG, sources)
    assert sorted(os.listdir(tmp_path)) == ["empty", "file"]


def test_overwriting_replaces_everything(single):
    path, _ = single
    (path / "old").write_text("x")
    values, sources = tensors(3, seed=1)
    write_folder(path, {"new": 1}, sources, overwrite=True)
    same(CheckpointFolder.open(path), values)
    assert sorted(os.listdir(path)) == ["config.json", WEIGHTS]
    assert os.listdir(path.parent) == ["model"]


@pytest.mark.parametrize("target", ["file/model", "file/deeper/model"])
def test_an_unwritable_target_is_refused(tmp_path, target):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_folder(tmp_path / target, CONFIG, tensors()[1])
    assert os.listdir(tmp_path) == ["file"]


def test_a_target_the_system_does_not_let_write_is_refused():
    with pytest.raises(UserError, match="/proc/model cannot be written"):
        write_folder("/proc/model", CONFIG, tensors()[1])


@pytest.mark.parametrize("name", ["diffusion_pytorch_model.safetensors", "config.json", "side.json"])
def test_a_full_disk_at_any_file_leaves_nothing(tmp_path, monkeypatch, name):
    import pathlib

    real = pathlib.Path.open

    def full(self, mode="r", *args, **options):
        if name in self.name and "w" in mode:
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **options)

    monkeypatch.setattr(pathlib.Path, "open", full)
    with pytest.raises(UserError, match="No space left on device; free some space"):
        write_folder(tmp_path / "model", CONFIG, tensors()[1], side_files={"side.json": b"{}"})
    assert os.listdir(tmp_path) == []


def test_names_twice_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UserError, match="share a name"):
        write_folder(tmp_path / "model", CONFIG, tensors()[1] * 2, max_shard_bytes=100)
    assert os.listdir(tmp_path) == []


def test_an_exception_in_the_body_leaves_nothing_and_the_old_folder_stays(single):
    path, values = single

    def half():
        with new_folder(path, overwrite=True) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("halfway")

    with pytest.raises(RuntimeError, match="halfway"):
        half()
    same(CheckpointFolder.open(path), values)
    assert os.listdir(path.parent) == ["model"]


KILLED = """
import sys
import numpy as np
from qvdjax.checkpoint import TensorSource, write_folder

def make(i):
    if i == int(sys.argv[2]):
        print("now", flush=True)
        sys.stdin.read()  # until killed
    return np.zeros((256, 256), np.float32)

sources = [TensorSource(f"t{i}", (256, 256), np.dtype(np.float32), lambda i=i: make(i)) for i in range(4)]
write_folder(sys.argv[1], {}, sources, overwrite=True, max_shard_bytes=600_000)
"""


@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_process_killed_while_saving_leaves_no_folder_under_the_name(tmp_path, at):
    """A real process, killed before the first tensor, within the first shard, and within the second."""
    _kill(tmp_path / "model", at)
    assert not (tmp_path / "model").exists()
    values, sources = tensors()
    write_folder(tmp_path / "model", CONFIG, sources)  # what is left behind does not stand in the way
    same(CheckpointFolder.open(tmp_path / "model"), values)


def test_a_process_killed_while_overwriting_leaves_the_old_folder(single):
    path, values = single
    _kill(path, 3)
    same(CheckpointFolder.open(path), values)


def _kill(target, at):
    command = [sys.executable, "-c", KILLED, str(target), str(at)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
