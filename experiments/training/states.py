"""Training states on disk: Orbax checkpoints named by their step, and beside them which run they belong to."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import jax

from experiments.training.trainer import State
from qvdjax.checkpoint.atomic import disk_errors, new_file
from qvdjax.errors import UserError

RUN: Final = "run.json"


def claim(folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a run's states, or find it again.

    Args:
        folder: Made if it is not there.
        run: Everything the states depend on, JSON types; kept in `run.json`.
        resume: Whether states may be there already.

    Raises:
        UserError: The folder holds states of another run, or any without `resume`, or cannot be written.
    """
    run, file = json.loads(json.dumps(run)), folder / RUN
    if _steps(folder):
        if not resume:
            remedy = "resume to go on from the newest, or name another folder"
            raise UserError(f"{folder} holds states of a training", remedy=remedy)
        try:
            held = json.loads(file.read_text())
        except (OSError, ValueError) as error:
            remedy = "name the folder of this run, or start without resuming"
            raise UserError(f"{folder} holds states but no readable {RUN}", remedy=remedy) from error
        if different := sorted(name for name in held | run if held.get(name) != run.get(name)):
            raise UserError(
                f"{folder} holds states of another run",
                remedy=f"resume with the options in {RUN} there, or name another folder",
                items=[f"{name}: {held.get(name)} there, {run.get(name)} here" for name in different],
            )
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with new_file(file) as unfinished:
        unfinished.write_text(json.dumps(run, indent=1) + "\n")


def _steps(folder: Path) -> list[int]:
    """Of the states of a folder, newest first."""
    return sorted((int(path.name) for path in folder.glob("*") if path.name.isdigit()), reverse=True)


def _named(state: State) -> dict[str, jax.Array]:
    """The state as a flat dictionary; Orbax then needs no knowledge of our types."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf
            for path, leaf in leaves}  # fmt: skip


def save_state(folder: Path, state: State, *, keep: int | None = None) -> None:
    """Write the state to the Orbax checkpoint `folder`/`step`, which appears under its name when complete.

    Args:
        folder: Of the run's states.
        state: What is written.
        keep: Older states than the newest so many are deleted afterwards; None keeps all.

    Raises:
        UserError: It cannot be written, or the disk is full.
    """
    import orbax.checkpoint as ocp

    path = (folder / str(int(state["step"]))).absolute()
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)  # left to Orbax, a failure here is waited for for minutes
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, _named(state))
    except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
        message = f"{path} cannot be written ({_first_line(error)})"
        raise UserError(message, remedy="free some space or choose another folder") from error
    for step in _steps(folder)[keep:] if keep else ():
        shutil.rmtree(folder / str(step))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def last_state(folder: Path, like: State) -> State | None:
    """The newest checkpoint of a folder, or None where there is none.

    Raises:
        UserError: It belongs to another model or optimizer than `like`, or is damaged.
    """
    import orbax.checkpoint as ocp

    steps = _steps(folder)
    if not steps:
        return None
    path = (folder / str(steps[0])).absolute()
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
    here = {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            metadata = checkpointer.metadata(path).item_metadata
            held = {name: (leaf.shape, leaf.dtype) for name, leaf in metadata.items()}
            if different := sorted(name for name in held | here if held.get(name) != here.get(name)):
                remedy = "name the checkpoint folder of the same model and settings, or start without --resume"
                raise UserError(f"{path} holds the state of another training", remedy=remedy, items=different)
            restored = checkpointer.restore(path, wanted)
    except (OSError, ValueError, KeyError, AttributeError) as error:  # what Orbax raises for damaged files
        remedy = "delete it to go on from the state before it"
        raise UserError(f"{path} cannot be read ({_first_line(error)})", remedy=remedy) from error
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])
