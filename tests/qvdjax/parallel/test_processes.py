"""What processes do together: fail, compare options, take their rows of a batch."""

import jax
import numpy as np
import pytest
from two_hosts import ended, two_hosts

from qvdjax.errors import UserError
from qvdjax.parallel import (
    check_same,
    initialize_distributed,
    make_mesh,
    on_first,
    process_rows,
    shard_batch,
    together,
    with_the_others,
)


def test_one_process_agrees_with_itself():
    assert together(lambda a, b: a + b, 1, b=2) == 3
    assert on_first(lambda: 4) == 4
    check_same("options", {"steps": 3})
    with pytest.raises(KeyError):
        together({}.__getitem__, "missing")


def test_one_process_holds_all_rows():
    assert process_rows(6, make_mesh({"fsdp": 2, "data": 3})).tolist() == [0, 1, 2, 3, 4, 5]
    assert process_rows(3, make_mesh({"tensor": 2})).tolist() == [0, 1, 2]


def test_a_batch_of_one_process_lies_where_the_rules_say():
    mesh = make_mesh({"fsdp": 4})
    rows = np.arange(8.0)
    for placed in (shard_batch(rows, mesh), shard_batch(rows[process_rows(8, mesh)], mesh, count=8)):
        np.testing.assert_array_equal(placed, rows)
        assert placed.addressable_shards[1].data.tolist() == [2, 3]


def test_processes_that_cannot_be_joined_are_named(monkeypatch):
    assert initialize_distributed(False) == 0
    seen = {}

    def initialize(**options):
        seen.update(options)
        raise ValueError("coordinator_address should be defined.\nmore")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(UserError, match="could not be joined: coordinator_address should be defined"):
        initialize_distributed(num_processes=2)
    assert seen == {"initialization_timeout": 300, "num_processes": 2}


@pytest.mark.parametrize(
    ("processes", "said", "plainly"),
    [
        (2, "UNKNOWN: Gloo AllGather failed: Connection closed by peer", True),
        (2, "RESOURCE_EXHAUSTED: out of memory", False),
        (1, "UNAVAILABLE: device", False),
    ],
)
def test_a_lost_process_is_said_plainly(monkeypatch, processes, said, plainly):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    expected = (UserError, "another process of this run has ended .*Gloo") if plainly else (RuntimeError, said)
    with pytest.raises(expected[0], match=expected[1]), with_the_others():
        raise jax.errors.JaxRuntimeError(said)


ONE_HOST = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from qvdjax.errors import UserError
from qvdjax.parallel import check_same, initialize_distributed, make_mesh, on_first, process_rows, shard_batch, together

rank, address, file = int(sys.argv[1]), *sys.argv[2:]
assert initialize_distributed(coordinator_address=address, num_processes=2, process_id=rank) == rank

def error_of(task, *arguments):
    try:
        task(*arguments)
    except Exception as error:
        return error

def on_one(failing, error):
    if rank == failing:
        raise error
    return rank

# One fails: all fail, each with what was wrong; nobody waits, and the next thing they do together works.
said = error_of(together, on_one, 1, UserError("no data", remedy="copy it", items=["a", "b"]))
assert (said.message, said.remedy) == ("no data" if rank else "process 1: no data", "copy it"), said
assert said.items == ("a", "b")
said = error_of(together, on_one, 0, ValueError("x" * 1000))
assert type(said) is (UserError if rank else ValueError), said
assert rank == 0 or said.message.startswith("process 0: ValueError: xxx")
assert together(on_one, 2, ValueError()) == rank
made = on_first(open, file, "x")
assert (made is None) == (rank == 1)
assert isinstance(error_of(on_first, open, file, "x"), UserError if rank else FileExistsError)
check_same("options", {"steps": 3, "mesh": None})
said = error_of(check_same, "options", {"steps": 3 + rank, "mesh": None})
assert said.message == "the processes have different options", said
assert said.items == ("steps: 3 on process 0, 4 on process 1",)

# Whatever is split between the processes, each passes the rows that its devices hold.
batch = np.arange(24.0).reshape(8, 3)
for sizes, rows in (
    ({"fsdp": -1}, 4), ({"data": 2, "tensor": 2}, 4), ({"tensor": 2, "fsdp": 2}, 4), ({"tensor": 4}, 8),
    ({"context": 4}, 8),
):
    mesh = make_mesh(sizes)
    held = process_rows(8, mesh)
    assert len(held) == rows, (sizes, held)
    placed = shard_batch({"latents": batch[held]}, mesh, count=8)["latents"]
    assert placed.shape == (8, 3)
    whole = jax.jit(lambda x: x, out_shardings=jax.NamedSharding(mesh, P()))(placed)
    np.testing.assert_array_equal(np.asarray(whole), batch)
assert isinstance(error_of(lambda: shard_batch(batch[:3], make_mesh({"fsdp": 4}), count=8)), ValueError)
"""


@pytest.mark.slow
def test_two_processes_fail_together_and_share_a_batch(tmp_path):
    with two_hosts(lambda rank, address: ["-c", ONE_HOST, rank, address, tmp_path / "file"]) as both:
        for code, _, error in ended(both):
            assert code == 0, error
