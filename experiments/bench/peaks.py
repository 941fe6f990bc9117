"""What the device can do: matrix rates measured in the same run, and what it is."""

import platform
import sys
from importlib import metadata
from pathlib import Path

import flax
import jax
import jax.numpy as jnp

from experiments.bench.timing import Timed, measure


def matrix_rates(float_dtype, rounds: int) -> dict:
    """Rates of a large square product on random data, in 10^12 operations a second (two a multiply-add).

    Both operands contract their last axis, as every layer here does. `factor` is the int8 rate over the float
    rate.
    """
    size = 1024 if jax.default_backend() == "cpu" else 8192
    left, right = (jax.random.normal(jax.random.key(k), (size, size), jnp.float32) for k in (0, 1))

    def product(result):
        contraction = (((1,), (1,)), ((), ()))
        return lambda a, b: jax.lax.dot_general(a, b, contraction, preferred_element_type=result)

    codes = [jnp.round(a * 30).astype(jnp.int8) for a in (left, right)]
    floats = [a.astype(float_dtype) for a in (left, right)]
    timed = [Timed(product(float_dtype), *floats), Timed(product(jnp.int32), *codes)]
    float_rate, int8_rate = (2 * size**3 / (m.median_ms * 1e-3) / 1e12 for m in measure(timed, rounds))
    return {
        "size": size, "float_dtype": jnp.dtype(float_dtype).name, "float_tera_ops": float_rate,
        "int8_tera_ops": int8_rate, "factor": int8_rate / float_rate,
    }  # fmt: skip


def memory_rate(dtype, rounds: int) -> dict:
    """Rate of reading and writing an array much larger than any cache, `memory_giga_bytes` (10^9 bytes) a second."""
    size = 2**24 if jax.default_backend() == "cpu" else 2**30
    timed = Timed(lambda a: a + 1, jnp.zeros((size,), dtype))
    timed.output = None
    (measured,) = measure([timed], rounds)
    return {"memory_giga_bytes": 2 * size * jnp.dtype(dtype).itemsize / (measured.median_ms * 1e-3) / 1e9}


def machine() -> dict:
    """Device, memory and versions."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "memory_bytes": memory_bytes(),
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "jaxlib": metadata.version("jaxlib"),
            "flax": flax.__version__,
            "backend": jax.extend.backend.get_backend().platform_version.split("\n")[0],
        },
        "command": _command(sys.argv),
    }


def memory_bytes() -> int | None:
    """Bytes jax may take on the device; None where the device does not say (a CPU)."""
    return (jax.devices()[0].memory_stats() or {}).get("bytes_limit")


def _command(argv: list[str]) -> str:
    """The command line as anyone would type it: without the place where the program lies."""
    program = Path(argv[0])
    name = f"python -m experiments.{program.parent.name}" if program.name == "__main__.py" else program.name
    return " ".join([name, *argv[1:]])
