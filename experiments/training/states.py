"""Training states on disk, as Orbax checkpoints: one folder a step, the newest is gone on from."""

from pathlib import Path

import jax

from experiments.training.trainer import State
from qvdjax.errors import UserError


def _named(state: State) -> dict[str, jax.Array]:
    """The state as a flat dictionary; Orbax then needs no knowledge of our types."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path): leaf
            for path, leaf in leaves}  # fmt: skip


def save_state(folder: Path, state: State) -> None:
    """Write the state to the Orbax checkpoint `folder`/`step`, which appears under its name when complete."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save((folder / str(int(state["step"]))).absolute(), _named(state))


def last_state(folder: Path, like: State) -> State | None:
    """The newest checkpoint of a folder, or None where there is none.

    Raises:
        UserError: It belongs to another model or optimizer than `like`.
    """
    import orbax.checkpoint as ocp

    steps = sorted((int(p.name) for p in folder.glob("*") if p.name.isdigit()), reverse=True)
    if not steps:
        return None
    path = (folder / str(steps[0])).absolute()
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, _named(like))
    with ocp.StandardCheckpointer() as checkpointer:
        held = {
            name: (leaf.shape, leaf.dtype) for name, leaf in checkpointer.metadata(path).item_metadata.items()
        }
        here = {name: (leaf.shape, leaf.dtype) for name, leaf in wanted.items()}
        if different := sorted(name for name in held | here if held.get(name) != here.get(name)):
            remedy = "name the checkpoint folder of the same model and settings, or start without --resume"
            raise UserError(f"{path} holds the state of another training", remedy=remedy, items=different)
        restored = checkpointer.restore(path, wanted)
    return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in wanted])
