"""Training states: none is None, a stranger's and a damaged one are named, a folder belongs to one run."""

import jax.numpy as jnp
import pytest

from experiments.training.states import RUN, claim, last_state, save_state
from qvdjax.errors import UserError

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


def test_a_folder_belongs_to_one_run(tmp_path):
    folder, run = tmp_path / "states", {"steps": 9, "shape": (2, 3)}
    claim(folder, run, resume=True)  # nothing there yet: the same command can be given from the start
    claim(folder, {**run, "steps": 10}, resume=False)  # no state was written
    claim(folder, run, resume=False)
    save_state(folder, STATE)
    with pytest.raises(UserError, match="holds states of a training"):
        claim(folder, run, resume=False)
    claim(folder, run, resume=True)
    with pytest.raises(UserError, match="another run") as refusal:
        claim(folder, {**run, "steps": 10, "seed": 1}, resume=True)
    assert refusal.value.items == ("seed: None there, 1 here", "steps: 9 there, 10 here")
    (folder / RUN).unlink()
    with pytest.raises(UserError, match="no readable run.json"):
        claim(folder, run, resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        claim(tmp_path / "file" / "states", run, resume=False)
