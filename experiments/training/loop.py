"""The steps of a run over a data folder: batches in, losses out, states saved on the way and when told to stop."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.training.log import Log
from experiments.training.states import save_state
from experiments.training.stopping import Stopped, told_to_stop
from experiments.training.trainer import State, Trainer
from qvdjax.parallel import shard_batch

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

REPORT_EVERY = 10  # steps between two lines of the log; reading the loss waits for the device
KEPT_STATES = 2
SHOWN = ("loss", "gradient_norm")


def run(
    trainer: Trainer, state: State, batches: Any, log: Log, *, checkpoints: Path | None = None, save_every: int = 500,
    progress: Progress | None = None,
) -> tuple[State, list[float | None]]:  # fmt: skip
    """Run the steps that are left.

    Args:
        trainer, state: What is trained, and from where.
        batches: batches[k] is the batch of step k, this host's rows of it.
        log: Gets a line every `REPORT_EVERY` steps and at every saved state: means over the steps since.
        checkpoints: Folder for training states, the newest `KEPT_STATES` are kept; None saves none, and then a
            signal to stop ends the process as it always does.
        save_every: Steps between two states.
        progress: Called with ("training", done, total).

    Returns:
        The last state, and the reported losses (None: no step since the last report was finite).

    Raises:
        UserError: The loss has not been finite for several steps, or a state cannot be written.
        Stopped: The process was told to stop; the state is saved.
    """
    first, steps = int(state["step"]), int(state["total"])
    reported, pending, since = [], [], time.perf_counter()
    with told_to_stop() as asked:
        for done in range(first + 1, steps + 1):
            state, metrics = trainer.advance_on(state, _placed(trainer, batches[done - 1]))
            pending.append(metrics)
            stop = checkpoints is not None and asked(done)
            save = checkpoints is not None and (stop or done % save_every == 0 or done == steps)
            if save or done % REPORT_EVERY == 0 or done == steps:
                reported.append(_report(trainer, state, pending, log, since))
                pending, since = [], time.perf_counter()
                if progress:
                    progress("training", done, steps)
            if save:
                save_state(checkpoints, state, keep=KEPT_STATES)
            if stop and done < steps:
                remedy = "run the same command with --resume"
                raise Stopped(f"told to stop after step {done}; its state is in {checkpoints}", remedy=remedy)
    return state, reported


def _placed(trainer: Trainer, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.tree.map(jax.numpy.asarray, batch) if trainer.mesh is None else shard_batch(batch, trainer.mesh)


def _report(trainer: Trainer, state: State, pending: list[dict], log: Log, since: float) -> float | None:
    """Write a line about the steps since the last one, at time `since`; returns their mean loss."""
    finite = [one for one in jax.device_get(pending) if not one["left_out"]]  # waits for the device
    seconds = time.perf_counter() - since
    trainer.check(state)
    means = {name: float(np.mean([one[name] for one in finite])) if finite else None for name in SHOWN}
    step = int(state["step"])
    log(
        event="train", step=step, **means, rates=trainer.settings.rates(step - 1, state["total"]),
        left_out=len(pending) - len(finite), seconds_per_step=seconds / len(pending), **trainer.watched(state),
    )  # fmt: skip
    return means["loss"]
