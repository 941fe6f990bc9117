"""Safetensors files: agreement with the format's own library, every lie a header can tell, full disks."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from qvdjax.checkpoint import SafetensorsFile, TensorSource, all_finite, floating_dtype, write_file
from qvdjax.checkpoint.header import DTYPES
from qvdjax.errors import UserError


def source(name, values):
    return TensorSource(name, values.shape, values.dtype, lambda: values)


def sources(tensors):
    return [source(name, values) for name, values in tensors.items()]


def some(dtype, shape, seed=0):
    """Random values of any type, through float32 where the type is a float."""
    values = np.random.default_rng(seed).integers(-8, 8, shape)
    return np.abs(values).astype(dtype) if np.dtype(dtype).kind in "bu" else values.astype(dtype)


def raw_file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


@pytest.mark.parametrize("name", DTYPES)
def test_every_type_survives_a_round_trip(tmp_path, name):
    if name == "F8_E8M0":  # powers of two only
        values = np.array([[1, 2, 4], [8, 0.5, 16]]).astype(DTYPES[name])
    else:
        values = some(DTYPES[name], (2, 3))
    write_file(tmp_path / "a.safetensors", sources({"x": values}))
    file = SafetensorsFile(tmp_path / "a.safetensors")
    back = file.read("x")
    assert back.dtype == values.dtype
    assert back.tobytes() == values.tobytes()
    part = file.read("x", (slice(1, 2), slice(0, 2)))
    assert part.tobytes() == values[1:2, :2].tobytes()


def test_scalars_and_empty_tensors_survive(tmp_path):
    tensors = {
        "scalar": np.array(2.5, np.float32),
        "none": np.zeros((0, 3), np.float64),
        "one": np.ones(1, np.int8),
    }
    write_file(tmp_path / "a.safetensors", sources(tensors), {"note": "x"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"format": "pt", "note": "x"}
    for name, values in tensors.items():
        back = file.read(name)
        assert back.shape == values.shape
        np.testing.assert_array_equal(back, values)
    assert file.read("none", (slice(0, 0), slice(1, 2))).shape == (0, 1)
    assert file.read("one", (slice(1, 1),)).shape == (0,)


def test_the_formats_own_library_reads_ours_and_we_read_its(tmp_path):
    kinds = (np.float32, np.int8, ml_dtypes.bfloat16, np.float64, np.bool_, np.int64)
    tensors = {f"t{i}": some(kind, (3, 5), i) for i, kind in enumerate(kinds)}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_file(ours, sources(tensors))
    save_file(tensors, theirs)
    for name, values in load_file(ours).items():
        assert values.tobytes() == tensors[name].tobytes()
    file = SafetensorsFile(theirs)
    assert {name: file.read(name).tobytes() for name in file.tensors} == {k: v.tobytes() for k, v in tensors.items()}


def test_every_tensor_starts_at_a_multiple_of_its_width(tmp_path):
    tensors = {
        "a": some(np.int8, (3,)),
        "b": some(np.float64, (2,)),
        "c": some(np.float16, (3,)),
        "d": some(np.int64, ()),
    }
    write_file(tmp_path / "a.safetensors", sources(tensors))
    for info in SafetensorsFile(tmp_path / "a.safetensors").tensors.values():
        assert info.start % info.dtype.itemsize == 0


def test_one_tensor_is_alive_at_a_time(tmp_path):
    import gc
    import weakref

    made = []

    def make():
        gc.collect()
        assert all(other() is None for other in made)
        values = np.ones((4, 4), np.float32)
        made.append(weakref.ref(values))
        return values

    write_file(
        tmp_path / "a.safetensors",
        [TensorSource(str(i), (4, 4), np.dtype(np.float32), make) for i in range(4)],
    )
    assert len(made) == 4


# Each case: header, bytes of data, words the message must hold.
LIES = {
    "a gap": ({"a": F32, "b": {**F32, "data_offsets": [28, 52]}}, 52, "gap"),
    "a gap at the start": ({"a": {**F32, "data_offsets": [4, 28]}}, 28, "gap"),
    "overlapping tensors": ({"a": F32, "b": {**F32, "data_offsets": [20, 44]}}, 44, "overlaps"),
    "the same bytes twice": ({"a": F32, "b": F32}, 24, "overlaps"),
    "an unknown type": ({"a": {**F32, "dtype": "F33"}}, 24, "unknown type 'F33'"),
    "a type that is no string": ({"a": {**F32, "dtype": ["F32"]}}, 24, "unknown type"),
    "shape against bytes": ({"a": {**F32, "shape": [2, 4]}}, 24, "does not fill"),
    "a type of another width": ({"a": {**F32, "dtype": "F16"}}, 24, "does not fill"),
    "a negative size": ({"a": {**F32, "shape": [-2, -3]}}, 24, "corrupt shape"),
    "a boolean size": ({"a": {**F32, "shape": [True, 6]}}, 24, "corrupt shape"),
    "a float size": ({"a": {**F32, "shape": [2.0, 3]}}, 24, "corrupt shape"),
    "offsets the wrong way round": ({"a": {**F32, "data_offsets": [24, 0]}}, 24, "data_offsets"),
    "three offsets": ({"a": {**F32, "data_offsets": [0, 12, 24]}}, 24, "data_offsets"),
    "a missing field": ({"a": {"dtype": "F32", "shape": [2, 3]}}, 24, "exactly the fields"),
    "an extra field": ({"a": {**F32, "strides": [3, 1]}}, 24, "exactly the fields"),
    "an entry that is no object": ({"a": 3}, 24, "exactly the fields"),
    "bytes at the end": ({"a": F32}, 25, "belong to no tensor"),
    "too few bytes": ({"a": F32}, 23, "truncated"),
    "offsets beyond the file": ({"a": F32, "b": {**F32, "data_offsets": [24, 48]}}, 24, "truncated"),
    "a header that is a list": (b"[1, 2]", 0, "no JSON header"),
    "broken JSON": (b'{"a": ', 0, "corrupt header"),
    "JSON that is not UTF-8": (b'{"\xff": 1}', 0, "corrupt header"),
    "a name twice": (b'{"a":%b,"a":%b}' % ((json.dumps(F32).encode(),) * 2), 24, "appears twice"),
    "half a surrogate in a name": (b'{"\\ud800":%b}' % json.dumps(F32).encode(), 24, "corrupt header"),
    "metadata that is no table of strings": ({"__metadata__": {"a": 1}, "a": F32}, 24, "__metadata__"),
    "deeply nested JSON": (b'{"a":' + b"[" * 100_000, 0, "corrupt header"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path, lie):
    header, size, words = LIES[lie]
    path = raw_file(tmp_path / "a.safetensors", header, bytes(size))
    with pytest.raises(UserError) as error:
        SafetensorsFile(path)
    assert words in str(error.value)
    assert "a.safetensors" in str(error.value)


def test_the_same_header_without_a_lie_is_accepted(tmp_path):
    path = raw_file(tmp_path / "a.safetensors", {"a": F32, "b": {**F32, "data_offsets": [24, 48]}}, bytes(48))
    assert SafetensorsFile(path).read("b").tolist() == [[0.0] * 3] * 2


FIRST_BYTES = {
    "empty": (b"", "is empty"),
    "seven bytes": (b"\x08" * 7, "first eight bytes"),
    "garbage": (b"\xff" * 64, "not a safetensors file"),
    "a zip archive": (b"PK\x03\x04" + bytes(60), "PyTorch pickle"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(60), "PyTorch pickle"),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a page of HTML": (b"<!DOCTYPE html><html></html>", "not a safetensors file"),
    "a header length of zero": (bytes(64), "not a safetensors file"),
    "a header beyond the file": (struct.pack("<Q", 1000) + b'{"a": 1}', "truncated"),
    "a header of an absurd length": (struct.pack("<Q", 2**63) + b'{"a": 1}', "not a safetensors file"),
}


@pytest.mark.parametrize("case", FIRST_BYTES)
def test_what_is_no_safetensors_file_is_refused(tmp_path, case):
    content, words = FIRST_BYTES[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        SafetensorsFile(path)


def test_a_file_cut_at_any_byte_is_refused(tmp_path):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    write_file(whole, sources({"a": some(np.float32, (2, 3)), "b": some(np.int8, (5,))}))
    content = whole.read_bytes()
    for length in range(len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(UserError):
            SafetensorsFile(cut)


def test_missing_files_folders_and_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="is a folder"):
        SafetensorsFile(tmp_path)
    write_file(tmp_path / "a.safetensors", sources({"a": some(np.float32, (2, 3))}))
    with pytest.raises(UserError, match="holds no tensor b"):
        SafetensorsFile(tmp_path / "a.safetensors").read("b")


def test_a_file_that_shrinks_after_opening_is_refused_when_read(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, sources({"a": some(np.float32, (2, 3))}))
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="cannot be read"):
        file.read("a")


@given(st.sampled_from(["F16", "BF16", "F32", "F64", "F8_E5M2", "F8_E4M3"]), st.binary(min_size=8, max_size=160))
def test_finiteness_is_read_from_the_bits(name, content):
    values = np.frombuffer(content[: len(content) // 8 * 8], DTYPES[name])
    assert all_finite(values) == bool(np.isfinite(values.astype(np.float64)).all())


def test_one_bad_value_at_the_end_of_a_long_array_is_seen(monkeypatch):
    monkeypatch.setattr("qvdjax.checkpoint.safetensors_file._CHECK_AT_A_TIME", 7)
    values = np.zeros((5, 5), np.float32)
    assert all_finite(values)
    for bad in (np.nan, np.inf, -np.inf):
        values[4, 4] = bad
        assert not all_finite(values)
    assert all_finite(np.full(9, -1))  # integers hold neither


def test_types_are_named_as_numpy_or_the_format_does():
    assert floating_dtype("bfloat16") == floating_dtype("bf16") == ml_dtypes.bfloat16
    assert floating_dtype(np.float64) == np.float64
    for wrong in ("int8", "I8", "float33", object):
        with pytest.raises(UserError, match="no floating type"):
            floating_dtype(wrong)


def no_leftovers(folder):
    return [name for name in os.listdir(folder) if "partial" in name] == []


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path, monkeypatch):
    values = some(np.float32, (64, 64))
    real = open

    class Full:
        """A file on a disk that takes 1000 bytes, then none."""

        def __init__(self, path, mode):
            self.file, self.left = real(path, mode, buffering=0), 1000

        def write(self, content):
            self.left -= memoryview(content).nbytes
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    monkeypatch.setattr("pathlib.Path.open", lambda self, mode: Full(self, mode))
    with pytest.raises(UserError, match=r"No space left on device; free some space"):
        write_file(tmp_path / "a.safetensors", sources({"a": values, "b": values}))
    assert os.listdir(tmp_path) == []


def test_a_target_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        write_file(tmp_path / "file" / "a.safetensors", sources({"a": some(np.float32, (2,))}))


def test_a_target_the_system_does_not_let_write_is_refused():
    with pytest.raises(UserError, match="cannot be written"):
        write_file("/proc/a.safetensors", sources({"a": some(np.float32, (2,))}))


def test_what_breaks_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write_file(path, sources({"a": np.ones(2, np.float32)}))

    def fail():
        raise RuntimeError("no values")

    with pytest.raises(RuntimeError, match="no values"):
        write_file(
            path,
            [*sources({"a": np.zeros(2, np.float32)}), TensorSource("b", (2,), np.dtype(np.float32), fail)],
        )
    assert SafetensorsFile(path).read("a").tolist() == [1, 1]
    assert no_leftovers(tmp_path)


def test_a_tensor_other_than_announced_is_a_programming_error(tmp_path):
    wrong = TensorSource("a", (2,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="announced"):
        write_file(tmp_path / "a.safetensors", [wrong])
    assert os.listdir(tmp_path) == []


def test_names_twice_and_types_without_a_place_are_refused(tmp_path):
    with pytest.raises(UserError, match="two tensors are called a"):
        write_file(tmp_path / "a.safetensors", sources({"a": np.ones(1)}) * 2)
    with pytest.raises(UserError, match="which safetensors lacks"):
        write_file(tmp_path / "a.safetensors", sources({"a": np.ones(1, ml_dtypes.int4)}))
