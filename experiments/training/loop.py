"""The steps of a run over a data folder: batches in, losses out, states saved on the way and when told to stop."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.training.log import Log
from experiments.training.states import States
from experiments.training.stopping import Stopped, told_to_stop
from experiments.training.trainer import State, Trainer
from qvdjax.parallel import shard_batch, with_the_others

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

REPORT_EVERY = 10  # steps between two lines of the log; reading the loss waits for the device
KEPT_STATES = 2
SHOWN = ("loss", "gradient_norm")


def run(
    trainer: Trainer, state: State, batches: Any, log: Log, *, checkpoints: Path | None = None, save_every: int = 500,
    flops: float | None = None, progress: Progress | None = None,
) -> tuple[State, list[float | None]]:  # fmt: skip
    """Run the steps that are left.

    Args:
        trainer, state: What is trained, and from where.
        batches: batches[k] is the batch of step k, of it the rows that this process's devices hold.
        log: Gets a line every `REPORT_EVERY` steps and at every saved state: means over the steps since.
        checkpoints: Folder for training states, the newest `KEPT_STATES` are kept; None saves none, and then a
            signal to stop ends the process as it always does.
        save_every: Steps between two states.
        flops: Model FLOPs of a step, of all devices together; None leaves their rate out of the log.
        progress: Called with ("training", done, total).

    Returns:
        The last state, and the reported losses (None: no step since the last report was finite).

    Raises:
        UserError: The loss has not been finite for several steps, a state cannot be written, or another process has
            ended. What was being written is finished first.
        Stopped: The process was told to stop; the state is saved.
    """
    first, steps = int(state["step"]), int(state["total"])
    reported, pending, since = [], [], time.perf_counter()
    resumable = checkpoints is not None
    with with_the_others(), told_to_stop(resumable=resumable) as asked, _states(checkpoints) as states:
        for done in range(first + 1, steps + 1):
            state, metrics = trainer.advance_on(state, _placed(trainer, batches[done - 1]))
            pending.append(metrics)
            stop = asked(done)
            save = states is not None and (stop or done % save_every == 0 or done == steps)
            if save or done % REPORT_EVERY == 0 or done == steps:
                reported.append(_report(trainer, state, pending, log, since, flops))
                pending, since = [], time.perf_counter()
                if progress:
                    progress("training", done, steps)
            if save:
                states.save(state)
            if stop and done < steps:
                raise _stopped(done, states)
    return state, reported


def _states(checkpoints: Path | None) -> contextlib.AbstractContextManager[States | None]:
    return contextlib.nullcontext() if checkpoints is None else States(checkpoints, keep=KEPT_STATES)


def _stopped(done: int, states: States | None) -> Stopped:
    if states is None:
        remedy = "give --checkpoints to be able to go on"
        return Stopped(f"told to stop after step {done}, and no states are kept", remedy=remedy)
    states.wait()
    remedy = "run the same command with --resume"
    return Stopped(f"told to stop after step {done}; its state is in {states.folder}", remedy=remedy)


def _placed(trainer: Trainer, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    if trainer.mesh is None:
        return jax.tree.map(jax.numpy.asarray, batch)
    return shard_batch(batch, trainer.mesh, count=trainer.settings.batch)


def _report(
    trainer: Trainer, state: State, pending: list[dict], log: Log, since: float, flops: float | None
) -> float | None:
    """Write a line about the steps since the last one, at time `since`; returns their mean loss."""
    finite = [one for one in jax.device_get(pending) if not one["left_out"]]  # waits for the device
    seconds = time.perf_counter() - since
    trainer.check(state)
    means = {name: float(np.mean([one[name] for one in finite])) if finite else None for name in SHOWN}
    step, total, steps = int(state["step"]), int(state["total"]), len(pending)
    rate = {} if flops is None else {"model_flops_per_second": flops * steps / seconds}
    log(
        event="train", step=step, **means, rates=trainer.settings.rates(step - 1, total),
        left_out=steps - len(finite), seconds_per_step=seconds / steps, **rate, **trainer.watched(state),
    )  # fmt: skip
    return means["loss"]
