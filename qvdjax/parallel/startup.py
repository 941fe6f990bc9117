"""Multi-host start-up: the same command on every host."""

import jax

from qvdjax.errors import UserError


def initialize_distributed(requested: bool = True, *, timeout_seconds: int = 300, **options) -> int:
    """Join the other hosts of this run, once, before any device is touched.

    On TPU pods, Slurm and Kubernetes jax finds the coordinator by itself; elsewhere pass
    `coordinator_address`, `num_processes` and `process_id` (see `jax.distributed.initialize`).

    Args:
        requested: False does nothing, so that a command can pass its `--distributed` flag.
        timeout_seconds: How long to wait for the other hosts.

    Returns:
        This host's number; host 0 writes files.

    Raises:
        UserError: The coordinator was not found, or the hosts did not all arrive.
    """
    if requested and not jax.distributed.is_initialized():
        try:
            jax.distributed.initialize(initialization_timeout=timeout_seconds, **options)
        except (RuntimeError, ValueError) as error:
            first_line = str(error).strip().splitlines()[0]
            raise UserError(
                f"the hosts could not be joined: {first_line}",
                remedy="start the same command on every host before anything else uses jax, and off a managed"
                " cluster pass coordinator_address, num_processes and process_id",
            ) from error
    return jax.process_index()
