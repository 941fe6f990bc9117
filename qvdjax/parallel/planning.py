"""What a step needs on a mesh, from compiling it: memory, collectives, integer products. Nothing is run."""

import re
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from qvdjax.parallel.memory import bytes_held
from qvdjax.parallel.program import Program
from qvdjax.parallel.topology import chip_bytes

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def plan(
    step: Callable, *abstract_args: Any, mesh: Mesh, donate: tuple[int, ...] = (), resident: int = 0,
    effort: float | None = None,
) -> dict:  # fmt: skip
    """Compile a step for a mesh, described or real, and report what one device needs.

    Args:
        step: The function to compile, or a jitted one; its arguments are positional.
        abstract_args: Trees of ShapeDtypeStruct with shardings on `mesh` (see `abstract`).
        mesh: In scope while the step is traced, so that `constrain` takes hold.
        donate: Positions of arguments whose memory the results may reuse; a jitted step has its own.
        resident: Bytes that lie on a device beside the step, and count in `bytes_per_chip`.
        effort: The compiler's, -1 to 1; None for its usual one. With less it takes minutes less, and the program more
            memory and time.

    Returns:
        `fits`: whether the program compiles and stays below `chip_bytes`.
        `bytes_per_chip`: arguments + temporaries + outputs - aliased of one device; None if the compiler
            did not say.
        `chip_bytes`: what a program may use there; None where no limit is known.
        `collectives`: [{kind, dtype, bytes, count}] of one device and one step (see `Program.collectives`).
        `compile_seconds`: lowering and compiling; `compile_processor_seconds`: of all cores meanwhile, which other
            work on the machine hardly changes.
        `reason`: the compiler's sentence when it does not fit, else None.
        `compiler_flops`, `compiler_bytes`: operations and memory traffic of one device as the compiler counts them: the
            body of a loop once, the dearest branch of a conditional; None if it did not say.
        And `argument_bytes`, `temporary_bytes`, `products` ([{left, right, result, count}]), `unknown_loops`,
        `devices`.
    """
    limit = chip_bytes(mesh.devices.flat[0])
    report = {
        "fits": False, "bytes_per_chip": None, "chip_bytes": limit, "collectives": [],
        "compile_seconds": None, "compile_processor_seconds": None, "reason": None, "argument_bytes": None,
        "temporary_bytes": None, "products": [], "unknown_loops": 0, "devices": mesh.devices.size,
        "compiler_flops": None, "compiler_bytes": None,
    }  # fmt: skip
    jitted = step if hasattr(step, "lower") else jax.jit(step, donate_argnums=donate)
    begin, begin_processor = time.perf_counter(), time.process_time()

    def spent() -> dict[str, float]:
        return {
            "compile_seconds": time.perf_counter() - begin,
            "compile_processor_seconds": time.process_time() - begin_processor,
        }

    try:
        with jax.set_mesh(mesh):
            options = None if effort is None else {"exec_time_optimization_effort": effort}
            compiled = jitted.lower(*abstract_args).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used, available = _stated_memory(str(error))
        reason = str(error).split(". ")[0].strip().splitlines()[0]
        return {
            **report, **spent(), "reason": reason, "bytes_per_chip": used, "chip_bytes": limit or available,
        }  # fmt: skip
    compiling = spent()
    memory, total = compiled.memory_analysis(), bytes_held(compiled) + resident
    program, cost = Program(compiled.as_text()), compiled.cost_analysis() or {}
    fits = limit is None or total <= limit
    reason = None if fits else f"needs {total / 2**30:.2f} GiB of {limit / 2**30:.2f} GiB"
    return {
        **report, **compiling, "fits": fits, "bytes_per_chip": total, "collectives": program.collectives(),
        "reason": reason, "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes, "products": program.products(),
        "unknown_loops": program.unknown_loops, "compiler_flops": cost.get("flops"),
        "compiler_bytes": cost.get("bytes accessed"),
    }  # fmt: skip


def _stated_memory(message: str) -> tuple[int | None, int | None]:
    """Used and available bytes as the compiler's message states them, in either of its two forms."""
    for pattern in (
        r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm",
        r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)",
    ):
        if found := re.search(pattern, message):
            used, used_unit, available, unit = found.groups()
            return round(float(used) * _UNITS[used_unit]), round(float(available) * _UNITS[unit])
    return None, None
