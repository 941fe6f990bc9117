"""Which implementation of an operation is run: what was asked for, or the best that takes the arrays on the device."""

import dataclasses
from collections.abc import Iterable
from typing import Literal, get_args

import jax

from qvdjax.errors import UserError

Implementation = Literal["xla", "mapped", "bfloat16", "simulate", "pallas_tpu", "mosaic_gpu", "cudnn"]
"""How an operation can be computed; no operation has them all.

xla: What the compiler makes of plain jnp. mapped: The same, one head after the other. bfloat16: Codes that are
multiplied as bfloat16, which holds them exactly. simulate: As float32. pallas_tpu, mosaic_gpu: Kernels of our own or of
jax's for that device. cudnn: NVIDIA's.
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a program is for.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        kind: As jax names it, such as "TPU v5 lite" or "NVIDIA H200".
    """

    platform: str
    kind: str


def target() -> Device:
    """The device that what is traced now is for: the mesh's in scope, which may be a described one, else the
    default."""
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:  # no mesh, or one of axis sizes alone
        return Device(jax.default_backend(), jax.devices()[0].device_kind)
    kind = described.device_kind
    if kind.startswith("TPU"):
        return Device("tpu", kind)
    return Device(jax.default_backend(), kind)


@dataclasses.dataclass(frozen=True)
class Option:
    """One implementation, looked at for arrays and a device.

    Attributes:
        refusal: Why it cannot take them; None where it can.
        preference: Why it is the one to take where nobody asks for another; None where it is not.
    """

    implementation: Implementation
    refusal: str | None = None
    preference: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """The implementation that is run, and why.

    Attributes:
        refused: (implementation, why it cannot be run) of all that cannot.
    """

    implementation: Implementation
    reason: str
    refused: tuple[tuple[Implementation, str], ...] = ()


def choose(operation: str, options: Iterable[Option], asked: Implementation | None) -> Choice:
    """The option asked for, else the first that is preferred and takes the arrays.

    Args:
        operation: Its name, for messages.
        options: Best first; one that takes everything and is preferred is among them.
        asked: None leaves it to the order.

    Raises:
        UserError: An unknown implementation, or one that cannot take the arrays.
    """
    options = tuple(options)
    refused = tuple((option.implementation, option.refusal) for option in options if option.refusal)
    able = [option for option in options if option.refusal is None]
    if asked is None:
        best = next(option for option in able if option.preference is not None)
        return Choice(best.implementation, best.preference, refused)
    remedy = f"use {' or '.join(option.implementation for option in able)}, or leave the choice open"
    if asked not in get_args(Implementation):
        raise UserError(f"{operation}: unknown implementation {asked!r}", remedy=remedy)
    if asked not in [option.implementation for option in options]:
        raise UserError(f"{operation} has no implementation {asked!r}", remedy=remedy)
    if asked in dict(refused):
        raise UserError(f"{operation}: {asked} cannot be run: {dict(refused)[asked]}", remedy=remedy)
    return Choice(asked, "asked for", refused)
