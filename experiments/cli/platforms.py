"""Where jax looks for devices when the user has not said."""

import glob
import importlib.util
import os
from pathlib import Path

GOOGLE_PCI_VENDOR = "0x1ae0"
GPU_DEVICES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg", "/dev/kfd")


def settle() -> None:
    """Choose the CPU where the TPU library is installed but neither a TPU nor a GPU is attached.

    With `libtpu` installed (compiling for TPU slices needs it) jax starts it to look for a TPU, and without
    one libtpu writes several lines of complaint to stderr. `JAX_PLATFORMS` set by the user is left alone.
    """
    if "JAX_PLATFORMS" in os.environ or importlib.util.find_spec("libtpu") is None:
        return
    vendors = (Path(path) for path in glob.glob("/sys/bus/pci/devices/*/vendor"))
    has_tpu = bool(glob.glob("/dev/accel*")) or any(
        path.read_text().strip() == GOOGLE_PCI_VENDOR and _is_accelerator(path.parent) for path in vendors
    )
    if not has_tpu and not any(os.path.exists(device) for device in GPU_DEVICES):
        os.environ["JAX_PLATFORMS"] = "cpu"


def _is_accelerator(device: Path) -> bool:
    # Google's network cards carry the same vendor; PCI class 0x02.... is a network controller.
    return not (device / "class").read_text().startswith("0x02")
