"""Jobs that run in a Python of their own, and how much memory they took.

The peak is read from /proc, not from getrusage: Linux lets a child's ru_maxrss start at what its parent held when it
forked, and a large pytest process would hide every peak below that.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import models

ROOT = Path(models.__file__).parents[1]

MEASURE = """
import contextlib, json, re, sys
from pathlib import Path

def memory(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

@contextlib.contextmanager
def measured():
    # The highest mark is set back to what is in use now. Where the system does not allow that, the mark keeps the
    # peak of the imports, and the test is only stricter.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    report = {}
    yield report
    peak = memory("VmHWM")
    print(json.dumps(report | {"before": before, "growth": peak - before, "peak": peak}))
"""


def run(job: str, *arguments) -> dict:
    """The report of a job that must end well.

    Args:
        job: Python; what stands under `with measured() as report:` is measured, and what it puts there is kept.
        arguments: Become sys.argv[1:].

    Returns:
        Bytes: `before`, `growth` and `peak` of the whole process.
    """
    # One device, as on a user's machine, instead of the suite's eight.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)  # nor compiled in a hurry
    done = subprocess.run(
        [sys.executable, "-c", MEASURE + job, *map(str, arguments)],
        env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=1800,
    )  # fmt: skip
    report = json.loads(done.stdout.splitlines()[-1])
    print(job.strip().splitlines()[-1], {name: f"{value:,.0f}" for name, value in report.items()})
    return report
