"""Where numbers come from: device, versions, command."""

import importlib.metadata
import platform
import shlex
import sys

PACKAGES = ("qvdjax", "jax", "jaxlib", "flax", "numpy")


def device() -> dict:
    """The devices JAX computes on: {platform, kind, count}."""
    import jax

    first = jax.devices()[0]
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count()}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide the numbers; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def command_line() -> str:
    """The command this process was started with."""
    return shlex.join(sys.argv)
