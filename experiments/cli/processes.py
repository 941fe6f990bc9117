"""Several processes that run one command: joined before the work, and one of them tells."""

import contextlib
import os
import sys
from collections.abc import Iterator

from experiments.cli import values
from experiments.cli.options import Processes


@contextlib.contextmanager
def joined(options: Processes) -> Iterator[bool]:
    """Join the processes that the options name, before anything touches a device: later jax cannot.

    Yields:
        Whether this is the process that tells: the first one, or the only one.

    Raises:
        UserError: The options do not fit each other, or the processes were not joined.
    """
    named = values.processes(
        options.distributed, options.coordinator_address, options.num_processes, options.process_id
    )
    if named is None:
        yield True
        return
    with _stdout_on_stderr():
        from qvdjax.parallel import initialize_distributed

        yield initialize_distributed(**named) == 0


@contextlib.contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Gloo, which connects processes on CPUs, writes lines about it to file descriptor 1, where answers go."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
