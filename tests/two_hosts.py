"""Two processes of two virtual CPU devices each, which find each other as two hosts do."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def two_hosts(command: Callable[[int, str], Sequence[object]], **environment: str) -> Iterator[list[subprocess.Popen]]:
    """Start `python *command(rank, address)` for ranks 0 and 1; both are gone afterwards.

    `environment` is set for both, beside what finds the devices and this package.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    # The suite's own settings of XLA are kept, but for the number of devices; the last one counts.
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    settings = {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **environment}
    hosts = []
    try:
        for rank in (0, 1):
            argv = [sys.executable, *map(str, command(rank, address))]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            hosts.append(subprocess.Popen(argv, cwd=ROOT, env={**os.environ, **settings}, **pipes))
        yield hosts
    finally:
        for host in hosts:
            host.kill()
            host.wait()


def ended(hosts: Sequence[subprocess.Popen], *, timeout: float = 600) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of each, when all have ended."""
    said = [host.communicate(timeout=timeout) for host in hosts]
    return [(host.returncode, out, error) for host, (out, error) in zip(hosts, said, strict=True)]
