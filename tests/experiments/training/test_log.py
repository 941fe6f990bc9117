"""What training says: JSON lines, and the same numbers as TensorBoard's curves."""

import builtins
import json
import struct

import pytest

from experiments.training.log import Log
from qvdjax.errors import UserError


def curves(folder):
    """(name, step) -> value of every scalar in the event files of a folder, read record by record."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)  # then a checksum of 4 bytes, the record, another checksum
            event = Event.FromString(data[at + 12 : at + 12 + length])
            found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
            at += 16 + length
    return found


def test_lines_and_curves_say_the_same(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl", echo=True, tensorboard=tmp_path / "curves")
    log(event="train", step=10, loss=0.5, rates={"weights": 1e-4}, left_out=0, name="a", whole=True)
    log(event="train", step=20, loss=None, rates={"weights": 2e-4}, left_out=1)
    log(event="saved", folder="out")
    log.curves.close()  # its own thread writes
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert (lines[0]["loss"], lines[1]["loss"], lines[2]["folder"]) == (0.5, None, "out")
    found = curves(tmp_path / "curves")
    assert found == {
        ("train/loss", 10): 0.5,
        ("train/rates/weights", 10): pytest.approx(1e-4),
        ("train/left_out", 10): 0,
        ("train/rates/weights", 20): pytest.approx(2e-4),
        ("train/left_out", 20): 1,
    }


def test_without_its_writer_curves_are_refused(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **more):
        if name == "tensorboardX":
            raise ImportError(name)
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="tensorboardX"):
        Log(tensorboard=tmp_path)
