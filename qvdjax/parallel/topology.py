"""TPU slices described without hardware: a mesh to compile for, and what one device of each kind can hold."""

import math
import os
from collections.abc import Mapping

import jax
from jax.sharding import Mesh

from qvdjax.errors import UserError
from qvdjax.parallel.mesh import make_mesh

# Memory that a program may use on one jax device, GiB: the limit the compiler itself states when a program is
# too large ("exceeds available HBM (15.75G)"; libtpu 0.0.51, jax 0.10.2). A v7x chip is two jax devices.
DEVICE_GIB = {"TPU v5 lite": 15.75, "TPU v5": 95.74, "TPU v6 lite": 31.25, "TPU7x": 94.75}
EXAMPLES = ("v5e:2x4", "v5p:2x2x1", "v6e:16x16", "tpu7x:2x2x1")


def chip_bytes(device: jax.Device) -> int | None:
    """Bytes that a program may use on one device of this kind; None where no limit is known (a CPU)."""
    if device.device_kind in DEVICE_GIB:
        return round(DEVICE_GIB[device.device_kind] * 2**30)
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except (AttributeError, jax.errors.JaxRuntimeError):
        return None  # described devices and CPUs keep no statistics


def topology_mesh(name: str, sizes: Mapping[str, int] | None = None) -> Mesh:
    """The mesh of a slice that need not exist; programs compile for it and cannot run.

    Needs the libtpu wheel, no TPU. Takes about 0.1 s.

    Args:
        name: Generation and layout, such as "v5e:2x4" (eight chips), "v5e:1x1" (one) or "v6e:16x16".
        sizes: Mesh axis sizes (see `make_mesh`); by default the tokens are split over all devices.

    Raises:
        UserError: Unknown name, no libtpu, or sizes that do not fit the slice.
    """
    # Read when libtpu starts: there is no metadata server to ask, and other processes may hold the library
    # too.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    layout = name.partition(":")[2]
    chips = math.prod(int(part) for part in layout.split("x") if part.isdecimal())
    # A host has four chips or more unless told otherwise, and a smaller slice is refused.
    options = {"chips_per_host_bounds": _bounds(layout)} if chips < 4 and layout else {}
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError, RuntimeError) as error:
        if "INVALID_ARGUMENT" in str(error):
            raise UserError(
                f"no TPU slice is called {name!r}",
                remedy=f"write generation:layout with even sides, such as {', '.join(EXAMPLES)}",
            ) from error
        raise UserError(
            "the TPU compiler did not start: " + str(error).strip().splitlines()[0],
            remedy="install it with `pip install 'qvdjax[tpu]'`; no TPU is needed",
        ) from error
    return make_mesh({"context": -1} if sizes is None else sizes, devices)


def _bounds(layout: str) -> tuple[int, ...]:
    sides = tuple(int(part) for part in layout.split("x") if part.isdecimal())
    return (*sides, *(1,) * (3 - len(sides)))
