"""Training states: none is None, a stranger's and a damaged one are named, a folder belongs to one run."""

import asyncio
import resource
import threading

import jax
import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.serialization import jax_array_handlers

from experiments.training.states import RUN, States, claim, last_state, save_state
from qvdjax.errors import UserError

# Where one of the reads or writes of a state fails, Orbax closes its event loop without waiting for the others, and
# each of those complains when it is done, be it in a later test.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STATE = {"params": {"weight": jnp.arange(6.0).reshape(2, 3)}, "step": jnp.int32(3), "total": jnp.int32(9)}
ANOTHER = {"params": {"weight": jnp.zeros((2, 3))}, "step": jnp.int32(0), "total": jnp.int32(0)}


def test_the_newest_state_is_read(tmp_path):
    assert last_state(tmp_path, ANOTHER) is None
    for step in (3, 12, 7):
        save_state(tmp_path, {**STATE, "step": jnp.int32(step)})
    found = last_state(tmp_path, ANOTHER)
    assert (int(found["step"]), int(found["total"])) == (12, 9)
    assert (found["params"]["weight"] == STATE["params"]["weight"]).all()


def test_old_states_go_when_asked(tmp_path):
    for step in (1, 2, 10):
        save_state(tmp_path, {**STATE, "step": jnp.int32(step)}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "2"]


def test_a_strangers_state_is_refused(tmp_path):
    save_state(tmp_path, STATE)
    with pytest.raises(UserError, match="another training") as refusal:
        last_state(tmp_path, {**ANOTHER, "params": {"strange": jnp.zeros(3)}})
    assert set(refusal.value.items) == {"params.strange", "params.weight"}


@pytest.mark.parametrize("damage", ["_METADATA", "manifest.ocdbt", "d"])
def test_a_damaged_state_is_named(tmp_path, damage):
    save_state(tmp_path, STATE)
    found = [path for path in (tmp_path / "3").rglob(damage) if path.exists()]
    assert found
    for path in found:
        for file in [path] if path.is_file() else path.iterdir():
            file.unlink()
    with pytest.raises(UserError, match="3 cannot be read"):
        last_state(tmp_path, ANOTHER)


def test_a_state_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        save_state(tmp_path / "file", STATE)


@pytest.fixture
def held_back(monkeypatch):
    """An event without which nothing of a state's arrays is written; it is set."""
    event, write = threading.Event(), jax_array_handlers._async_serialize_replica_slices
    event.set()

    async def wait(*args, **more):
        while not event.is_set():
            await asyncio.sleep(0.01)
        return await write(*args, **more)

    monkeypatch.setattr(jax_array_handlers, "_async_serialize_replica_slices", wait)
    yield event
    event.set()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.isdigit())


def test_training_goes_on_while_a_state_is_written(tmp_path, held_back):
    """What is stored is the state of that step, though its memory was given to the steps after it."""
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    # A megabyte, so that nothing keeps it beside by chance.
    state = {"params": {"weight": jnp.arange(2.0**18).reshape(512, 512)}, "step": jnp.int32(1), "total": jnp.int32(9)}
    like = jax.tree.map(jnp.zeros_like, state)
    save_state(tmp_path, {**state, "step": jnp.int32(0)})
    held_back.clear()
    with States(tmp_path, keep=1) as states:
        states.save(state)
        for _ in range(3):
            state = step(state)  # may reuse the memory of what is saved, or has to leave it alone where it is read
        reached, complete = int(state["step"]), names(tmp_path)
        held_back.set()
        states.wait()
        assert (reached, complete) == (4, ["0"])  # and the older state was there until the newer one was complete
        assert names(tmp_path) == ["1"]
    found = last_state(tmp_path, like)
    assert int(found["step"]) == 1
    assert (found["params"]["weight"] == jnp.arange(2.0**18).reshape(512, 512)).all()


def test_leaving_waits_for_the_last_write(tmp_path, held_back):
    held_back.clear()
    with States(tmp_path) as states:
        states.save(STATE)
        begun = names(tmp_path)
        threading.Timer(0.2, held_back.set).start()
    assert (begun, names(tmp_path)) == ([], ["3"])
    with pytest.raises(KeyboardInterrupt), States(tmp_path) as states:  # noqa: PT012 - the state is begun inside
        states.save({**STATE, "step": jnp.int32(4)})
        raise KeyboardInterrupt
    assert names(tmp_path) == ["3", "4"]


@pytest.fixture
def small_disk():
    """A function that lets no file grow beyond 64 KiB: to a program that writes, a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("at", ["next save", "end"])
def test_a_full_disk_is_reported_and_leaves_the_last_state(tmp_path, small_disk, at):
    weight = jax.random.normal(jax.random.key(0), (512, 512))  # does not compress
    state = {"params": {"weight": weight}, "step": jnp.int32(1), "total": jnp.int32(9)}
    states = States(tmp_path, keep=1)
    states.save(state)
    states.wait()
    small_disk()
    states.save({**state, "step": jnp.int32(2)})  # begun, and the steps go on
    with pytest.raises(UserError, match="2 cannot be written .*; free some space"):
        states.save({**state, "step": jnp.int32(3)}) if at == "next save" else states.__exit__(None, None, None)
    assert names(tmp_path) == ["1"]
    assert (last_state(tmp_path, state)["params"]["weight"] == weight).all()


@pytest.mark.parametrize("code", [1, 0])
def test_the_reason_is_said_however_much_hangs_on_it(tmp_path, monkeypatch, code):
    """The error's code and the whole specification follow the reason, now in this order, now in the other."""
    written = "Failed to write 16231 bytes to file 14: File too large"
    annotations = [" [os_error_code='27']", f" [tensorstore_spec='{{{'driver, ' * 200}}}']"]
    message = f"OUT_OF_RANGE: Error opening {'long/path/' * 30}: {written}{annotations[1 - code]}{annotations[code]}"

    def fail(*_):
        raise ValueError(message)

    states = States(tmp_path)
    monkeypatch.setattr(states._checkpointer, "save", fail)
    with pytest.raises(UserError) as error:
        states.save(STATE)
    assert str(error.value).count(written) == 1
    assert "driver" not in str(error.value)


def test_a_folder_belongs_to_one_run(tmp_path):
    folder, run = tmp_path / "states", {"steps": 9, "shape": (2, 3)}
    claim(folder, run, resume=True)  # nothing there yet: the same command can be given from the start
    claim(folder, {**run, "steps": 10}, resume=False)  # no state was written
    claim(folder, run, resume=False)
    save_state(folder, STATE)
    (folder / "4.orbax-checkpoint-tmp" / "d").mkdir(parents=True)
    with pytest.raises(UserError, match="holds states of a training"):
        claim(folder, run, resume=False)
    claim(folder, run, resume=True)
    assert sorted(path.name for path in folder.iterdir()) == ["3", RUN]
    with pytest.raises(UserError, match="another run") as refusal:
        claim(folder, {**run, "steps": 10, "seed": 1}, resume=True)
    assert refusal.value.items == ("seed: None there, 1 here", "steps: 9 there, 10 here")
    (folder / RUN).unlink()
    with pytest.raises(UserError, match="no readable run.json"):
        claim(folder, run, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        claim(tmp_path / "file" / "states", run, resume=False)
