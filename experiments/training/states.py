"""Training states on disk: Orbax checkpoints named by their step, and beside them which run they belong to."""

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, Self

import jax

from experiments.training.trainer import State
from qvdjax.checkpoint.atomic import disk_errors, new_file
from qvdjax.errors import UserError
from qvdjax.parallel import check_same

RUN: Final = "run.json"
UNFINISHED: Final = ".orbax-checkpoint-tmp"  # how Orbax ends the name of a checkpoint that is being written


def claim(folder: Path, run: Mapping[str, Any], *, resume: bool) -> None:
    """Make the folder of a run's states, or find it again; states that were not written to the end are deleted.

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
        for unfinished in folder.glob(f"*{UNFINISHED}"):  # what a killed run or a full disk left
            shutil.rmtree(unfinished)
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


class States:
    """Writes the states of a run while it goes on: `save` takes a copy and returns, the rest is done beside the steps.

    A state appears as the Orbax checkpoint `folder`/`step` when it is complete. Of several processes each writes the
    shards of its devices, and all must save the same steps. As a context, it ends when the last write has.

    Orbax's CheckpointManager would do the same, but it asks jax whether to stop from a thread of its own, for a step
    that is over, and a process that trains may then miss the step at which all stop.

    Args:
        folder: Of the run's states.
        keep: Older states than the newest so many are deleted once a newer one is complete; None keeps all.
    """

    def __init__(self, folder: Path, *, keep: int | None = None):
        import orbax.checkpoint as ocp

        self.folder, self.keep = folder, keep
        self._checkpointer = ocp.StandardCheckpointer()
        self._beside = ThreadPoolExecutor(1, thread_name_prefix="states")
        self._writing: tuple[Path, Future] | None = None

    def save(self, state: State) -> None:
        """Begin to write a state, when the one before is written. It may be given away afterwards.

        Raises:
            UserError: It cannot be written, or the disk is full; or that was so of the one before.
        """
        self.wait()
        path = (self.folder / str(int(state["step"]))).absolute()
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)  # left to Orbax, a failure here is waited for for minutes
        with _write_errors(path):
            self._checkpointer.save(path, _named(state))
        self._writing = path, self._beside.submit(self._finish)

    def wait(self) -> None:
        """Until everything is written.

        Raises:
            UserError: It could not be written; older states are as they were.
        """
        if self._writing is not None:
            (path, writing), self._writing = self._writing, None
            with _write_errors(path):
                writing.result()

    def _finish(self) -> None:
        self._checkpointer.wait_until_finished()
        if self.keep is not None and jax.process_index() == 0:
            for step in _steps(self.folder)[self.keep :]:
                shutil.rmtree(self.folder / str(step))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A device or another process is gone: waiting for what it has to write would only hide that.
            self._beside.shutdown(wait=False)
            return
        try:
            self.wait()
        except UserError:
            if error is None:  # otherwise what went wrong first is what is said
                raise
        finally:
            self._beside.shutdown()
            self._checkpointer.close()


def save_state(folder: Path, state: State, *, keep: int | None = None) -> None:
    """Write one state and wait for it; see `States`."""
    with States(folder, keep=keep) as states:
        states.save(state)


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore raises ValueError for a full disk
        message = f"{path} cannot be written ({_first_line(error)})"
        raise UserError(message, remedy="free some space or choose another folder") from error


def _first_line(error: Exception) -> str:
    line = (str(error).splitlines() or [type(error).__name__])[0]
    line = re.sub(r" \[\w+='.*", "", line)  # what tensorstore hangs on, in any order: whole specifications among it
    return line if len(line) <= 200 else f"{line[:60]} ... {line[-135:]}"  # the reason comes last


def last_state(folder: Path, like: State) -> State | None:
    """The newest checkpoint of a folder, or None where there is none.

    Raises:
        UserError: It belongs to another model or optimizer than `like`, or is damaged; or not all processes see it.
    """
    import orbax.checkpoint as ocp

    steps = _steps(folder)
    check_same(f"states in {folder}", {"newest": steps[0] if steps else None})
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
