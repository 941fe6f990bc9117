"""Comparing a model with diffusers' in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path


def parity_errors(program: str, cases: dict | list, folder: Path) -> dict[str, float]:
    """The relative L2 errors that a program prints as JSON in its last line.

    It runs in a process of its own, because JAX's 64 bits are global, and compiles without most optimizations: many
    models are compiled and each runs a few times.

    Args:
        program: Python; its arguments are the cases as JSON and the folder.
        cases: JSON types.
        folder: Where it may write.
    """
    settings = {"JAX_ENABLE_X64": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(cases), str(folder)],
        capture_output=True, text=True, env={**os.environ, **settings}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
