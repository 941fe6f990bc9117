"""A folder of predictions: what was made is read back, an interruption loses one shard, and nothing foreign is used."""

import fcntl
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from experiments.training import teacher_cache
from experiments.training.stopping import Stopped
from experiments.training.teacher_cache import MANIFEST, Taught, TeacherCache
from qvdjax.errors import UserError

SHAPE = (3, 2, 3, 5, 4)  # batch, frames, height, width, channels
MADE_BY = {"seed": 0, "model": {"layers": 2}, "batch": 3}


class Batches:
    """batches[k] of a seed, as a data folder has them."""

    def __init__(self, seed=0):
        self.seed = seed

    def __getitem__(self, step):
        random = np.random.default_rng((self.seed, step))
        return {"latents": random.standard_normal(SHAPE, np.float32), "context": np.full((3, 7, 2), step, np.float32)}


class Teacher:
    """Predicts something of the batch and the step, and counts how often it is asked."""

    def __init__(self, dtype=np.float32):
        self.asked, self.dtype = [], dtype

    def __call__(self, step, batch):
        self.asked.append(step)
        return (2 * batch["latents"] + step).astype(self.dtype)


@pytest.fixture(autouse=True)
def _shards_of_two_steps(monkeypatch):
    monkeypatch.setattr(teacher_cache, "SHARD_STEPS", 2)


def opened(path, dtype=np.float32, **changes):
    return TeacherCache(path, {**MADE_BY, **changes}, jax.ShapeDtypeStruct(SHAPE, dtype))


def filled(path, steps=5, dtype=np.float32, **options):
    teacher, cache = Teacher(dtype), opened(path, dtype)
    cache.fill(steps, Batches(), teacher, **options)
    return cache, teacher


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Five steps in three shards."""
    path = tmp_path_factory.mktemp("cache") / "made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "SHARD_STEPS", 2)
        filled(path)
    return path


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written, tmp_path / "copy")


def names(path):
    return sorted(file.name for file in path.iterdir() if file.name[0] != ".")


def test_every_prediction_is_read_back_with_its_batch(written):
    cache = opened(written)
    assert cache.missing(5) == []
    for step in (4, 0, 3):  # in any order
        batch = Taught(Batches(), cache)[step]
        assert batch.keys() == {"latents", "context", "teacher"}
        np.testing.assert_array_equal(batch["teacher"], 2 * batch["latents"] + step)
    manifest = json.loads((written / MANIFEST).read_text())
    assert manifest["made_by"] == MADE_BY
    assert [(shard["file"], shard["first"]) for shard in manifest["shards"]] == [
        ("predictions-00000000.safetensors", 0), ("predictions-00000002.safetensors", 2),
        ("predictions-00000004.safetensors", 4),
    ]  # fmt: skip


def test_what_a_teacher_computes_in_bfloat16_is_kept_so(tmp_path):
    cache, _ = filled(tmp_path / "half", 1, ml_dtypes.bfloat16)
    found = cache.prediction(0, Batches()[0])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (2 * Batches()[0]["latents"]).astype(ml_dtypes.bfloat16))
    assert (tmp_path / "half" / "predictions-00000000.safetensors").stat().st_size < 2 * np.prod(SHAPE) + 1000


def test_a_complete_folder_asks_no_teacher(copy):
    before = {file.name: file.stat().st_mtime_ns for file in copy.iterdir() if file.suffix == ".safetensors"}
    _, teacher = filled(copy)
    assert teacher.asked == []
    assert before == {file.name: file.stat().st_mtime_ns for file in copy.iterdir() if file.suffix == ".safetensors"}


def test_a_shorter_run_takes_what_is_there_and_a_longer_one_goes_on(copy):
    assert opened(copy).missing(3) == []
    cache, teacher = filled(copy, 8)
    assert teacher.asked == [5, 6, 7]
    assert opened(copy).missing(8) == []
    for step in range(8):
        cache.prediction(step, Batches()[step])


def test_an_interrupted_writer_goes_on_at_its_shard(tmp_path):
    def interrupt(stage, done, total):
        if done == 4:  # in the second shard, before it is whole
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path / "cache", progress=interrupt)
    assert names(tmp_path / "cache") == [MANIFEST, "predictions-00000000.safetensors"]
    # What a killed process leaves.
    (tmp_path / "cache" / ".predictions-00000002.safetensors.partial-1").write_bytes(b"half")
    calls = []
    cache, teacher = filled(tmp_path / "cache", progress=lambda *call: calls.append(call))
    assert teacher.asked == [2, 3, 4]
    assert calls[-1] == ("the teacher's predictions", 3, 3)
    assert not list((tmp_path / "cache").glob("*.partial-*"))
    assert cache.missing(5) == []


def test_told_to_stop_it_keeps_whole_shards(tmp_path):
    def tell(stage, done, total):
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="before step 3") as stopped:
        filled(tmp_path / "cache", progress=tell)
    assert stopped.value.exit_code == 75
    assert names(tmp_path / "cache") == [MANIFEST, "predictions-00000000.safetensors"]
    assert filled(tmp_path / "cache")[1].asked == [2, 3, 4]


def test_a_shard_that_is_gone_is_made_again(copy):
    whole = (copy / "predictions-00000002.safetensors").read_bytes()
    (copy / "predictions-00000002.safetensors").unlink()
    cache, teacher = filled(copy)
    assert teacher.asked == [2, 3]
    assert (copy / "predictions-00000002.safetensors").read_bytes() == whole
    assert [shard.first for shard in cache.shards] == [0, 2, 4]


@pytest.mark.parametrize("damage", ["short", "empty", "other"])
def test_a_damaged_shard_is_named_before_training(copy, damage):
    file = copy / "predictions-00000002.safetensors"
    other = (copy / "predictions-00000000.safetensors").read_bytes()
    file.write_bytes({"short": file.read_bytes()[:-5], "empty": b"", "other": other}[damage])
    with pytest.raises(UserError, match="predictions-00000002.*delete") as refusal:
        opened(copy)
    assert "makes it anew" in refusal.value.remedy
    file.unlink()
    assert filled(copy)[1].asked == [2, 3]


def test_a_changed_bit_is_noticed_when_it_is_read(copy):
    file = copy / "predictions-00000002.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)
    cache = opened(copy)
    cache.prediction(2, Batches()[2])
    with pytest.raises(UserError, match="predictions-00000002.safetensors is damaged at step 3; delete it"):
        cache.prediction(3, Batches()[3])


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("shards"),
        lambda manifest: manifest["shards"].pop(1),
        lambda manifest: manifest["shards"][1].pop("batches"),
        lambda manifest: manifest["shards"][0]["predictions"].pop(),
        lambda manifest: manifest["shards"][0].update(file="../elsewhere.safetensors"),
        lambda manifest: manifest.update(shards=[1]),
    ],
)
def test_a_damaged_manifest_is_named(copy, change):
    manifest = json.loads((copy / MANIFEST).read_text())
    change(manifest)
    (copy / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"manifest\.json lists no shards that follow each other"):
        opened(copy)


@pytest.mark.parametrize(
    ("changes", "item"),
    [
        ({"seed": 1}, "made_by.seed: 0 there, 1 here"),
        ({"model": {"layers": 3}}, "made_by.model.layers: 2 there, 3 here"),
        ({"more": True}, "made_by.more: None there, True here"),
        ({"dtype": jnp.bfloat16}, "dtype: float32 there, bfloat16 here"),
    ],
)
def test_predictions_of_another_run_are_refused(copy, changes, item):
    with pytest.raises(UserError, match="this run cannot use") as refusal:
        opened(copy, **changes)
    assert refusal.value.items == (item,)


def test_predictions_on_other_data_are_refused(copy):
    cache = opened(copy)
    cache.check_data(Batches())
    for ask in (lambda: cache.check_data(Batches(seed=1)), lambda: cache.prediction(2, Batches(seed=1)[2])):
        with pytest.raises(UserError, match="other data than that of step"):
            ask()
    with pytest.raises(UserError, match="no prediction of step 5"):
        cache.prediction(5, Batches()[5])


@pytest.mark.parametrize("content", ["file", "folder", "manifest"])
def test_folders_of_something_else_are_left_alone(tmp_path, content):
    path = tmp_path / "cache"
    if content == "file":
        path.write_text("mine")
    else:
        path.mkdir()
        (path / ("notes.txt" if content == "folder" else MANIFEST)).write_text('{"format": "qvdjax-data"}')
    before = [file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())]
    with pytest.raises(UserError, match="choose another folder"):
        opened(path)
    assert before == [file.read_bytes() for file in ([path] if path.is_file() else path.iterdir())]


def test_a_disk_without_the_space_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    cache, step = opened(tmp_path / "cache"), 4 * int(np.prod(SHAPE))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=3 * step))
    assert cache.check_space(3) == 3 * step
    with pytest.raises(UserError, match=r"of 4 steps take 5\.625 KiB in .*cache, and 4\.219 KiB are free"):
        cache.check_space(4)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache cannot be written"):
        filled(tmp_path / "file" / "cache")


def test_a_disk_that_fills_up_keeps_whole_shards(tmp_path, monkeypatch):
    sync, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="predictions-00000002.safetensors cannot be written: No space left.*free some"):
        filled(tmp_path / "cache")
    assert names(tmp_path / "cache") == [MANIFEST, "predictions-00000000.safetensors"]


def test_one_process_writes_at_a_time(tmp_path):
    (tmp_path / "cache").mkdir()
    with (tmp_path / "cache" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process writes"):
            filled(tmp_path / "cache")
    assert filled(tmp_path / "cache")[1].asked == [0, 1, 2, 3, 4]


def test_what_another_process_wrote_meanwhile_is_not_made_again(tmp_path):
    late = opened(tmp_path / "cache")
    filled(tmp_path / "cache", 4)
    teacher = Teacher()
    late.fill(5, Batches(), teacher)
    assert teacher.asked == [4]


def test_a_prediction_that_is_not_finite_is_not_kept(tmp_path):
    with pytest.raises(UserError, match="prediction of step 1 is not finite"):
        opened(tmp_path / "cache").fill(2, Batches(), lambda step, batch: np.full(SHAPE, [1, np.inf][step], np.float32))
    assert names(tmp_path / "cache") == [MANIFEST]


def test_several_hosts_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="several hosts"):
        opened(tmp_path / "cache")
