"""Device meshes with the four axes that the sharding rules speak of."""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from qvdjax.errors import UserError

# data: copies of the model, each with its share of the batch. fsdp: also splits the batch, and spreads the
# weights. context: splits the tokens of one video, and spreads the weights too. tensor: splits heads and
# hidden features.
MESH_AXES = ("data", "fsdp", "context", "tensor")


def parse_mesh(text: str) -> dict[str, int]:
    """ "data=2,fsdp=4" -> {"data": 2, "fsdp": 4}; one size may be -1, which means "the remaining devices".

    Raises:
        UserError: Not of that form, an unknown or repeated axis, or a size that is no integer.
    """
    remedy = f"write name=size pairs such as fsdp=4,tensor=2 with names from {', '.join(MESH_AXES)}"
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        name, _, size = (p.strip() for p in part.partition("="))
        if name in sizes:
            raise UserError(f"the mesh {text!r} names {name!r} twice", remedy=remedy)
        try:
            sizes[name] = int(size)
        except ValueError:
            raise UserError(f"the mesh {text!r} has no whole number in {part!r}", remedy=remedy) from None
    if not sizes:
        raise UserError("the mesh is empty", remedy=remedy)
    _check_sizes(sizes)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp, context and tensor, those not named having size one.

    The axes are of type Auto: the compiler propagates shardings, and `constrain` pins them.

    Args:
        sizes: Axis name to size; one size may be -1, which takes the remaining devices.
        devices: By default all of this run. A smaller mesh takes the first ones, except across several hosts,
            where every device has to take part.

    Raises:
        UserError: Unknown axis, size below one, or a product that does not fit the devices.
    """
    available = list(jax.devices() if devices is None else devices)
    full = _fill_in(sizes, len(available))
    wanted, shape = math.prod(full.values()), tuple(full.values())
    text = ",".join(f"{name}={size}" for name, size in full.items() if size != 1) or "one device"
    if wanted > len(available):
        raise UserError(
            f"the mesh {text} needs {wanted} devices and there are {len(available)}",
            remedy=f"choose sizes whose product is at most {len(available)}",
        )
    if wanted < len(available) and devices is None and jax.process_count() > 1:
        raise UserError(
            f"the mesh {text} takes {wanted} of the {len(available)} devices of {jax.process_count()} hosts",
            remedy="choose sizes that take all devices, or start fewer hosts",
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    if devices is None and wanted == len(available):
        return jax.make_mesh(shape, MESH_AXES, axis_types=types)  # orders devices by their physical neighbours
    return Mesh(np.array(available[:wanted], dtype=object).reshape(shape), MESH_AXES, axis_types=types)


def _fill_in(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    _check_sizes(sizes)
    open_axes = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and devices % fixed:
        raise UserError(
            f"the mesh cannot fill in {open_axes[0]}: the others take {fixed} of {devices} devices",
            remedy=f"choose sizes whose product divides {devices}",
        )
    return {name: devices // fixed if sizes.get(name) == -1 else sizes.get(name, 1) for name in MESH_AXES}


def _check_sizes(sizes: Mapping[str, int]) -> None:
    unknown = [name for name in sizes if name not in MESH_AXES]
    if unknown:
        raise UserError(
            f"unknown mesh axis {unknown[0]!r}", remedy=f"the axes are {', '.join(MESH_AXES)}", items=unknown
        )
    wrong = [f"{name}={size}" for name, size in sizes.items() if size < 1 and size != -1]
    if wrong:
        raise UserError("a mesh axis has no size", remedy="sizes are at least 1, or -1 for the rest", items=wrong)
    if list(sizes.values()).count(-1) > 1:
        raise UserError("more than one mesh axis is -1", remedy="leave one axis open, and size the others")
