"""Told to stop: a preempted run ends after the step it is in, with its state saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

from qvdjax.errors import UserError


class Stopped(UserError):
    """The run was told to stop, and can be resumed where it saves states."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again


@contextlib.contextmanager
def told_to_stop(*, resumable: bool = True) -> Iterator[Callable[[int], bool]]:
    """While inside, SIGTERM does not end the process; it is what the yielded function answers.

    Args:
        resumable: Whether a state can be saved. Otherwise a process that trains alone is ended by the signal.

    Yields:
        asked(step): whether to stop after this step. Processes that train together agree on the step: jax's
        coordination service hears the signal on any of them, and has taken it over since they were joined. Every
        process has to ask at every step.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        yield multihost_utils.reached_preemption_sync_point
        return
    if not resumable or threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield lambda step: False
        return
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    try:
        yield lambda step: told.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)
