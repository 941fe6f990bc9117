"""How a video was made: what goes into the JSON file beside it."""

import collections
import dataclasses
import importlib.metadata
import resource
import sys

import jax
from jax.sharding import Mesh

from experiments.sampling.request import Request
from qvdjax import describe
from qvdjax.diffusion import solver_name


def settings_record(request: Request) -> dict:
    """What all videos of a request share."""
    return {
        "negative_prompt": request.negative_prompt,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "dynamic_guidance": request.dynamic_guidance,
        "guidance_until": request.guidance_until,
        "first_frame_guidance": request.first_frame_guidance,
        "solver": solver_name(request.solver),
        **dataclasses.asdict(request.solver),
        "latents": list(request.latents_shape),
        "padding": request.padding,
    }


def device_record(mesh: Mesh | None) -> dict:
    """The devices used, the mesh, and the versions of what computed."""
    devices = _devices(mesh)
    return {
        "device": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "mesh": None if mesh is None else {name: size for name, size in mesh.shape.items() if size > 1},
        "jax_version": jax.__version__,
        "flax_version": importlib.metadata.version("flax"),
        "jaxlib_version": importlib.metadata.version("jaxlib"),
    }


def memory_record(mesh: Mesh | None) -> dict:
    """Most memory in use so far: of the fullest device where it keeps count, otherwise of this process."""
    statistics = [device.memory_stats() for device in _devices(mesh) if device.process_index == jax.process_index()]
    peaks = [s["peak_bytes_in_use"] for s in statistics if s and "peak_bytes_in_use" in s]
    if peaks:
        return {"peak_memory_bytes": max(peaks), "peak_memory_of": "fullest device"}
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return {"peak_memory_bytes": resident * unit, "peak_memory_of": "process"}


def quantization_record(model) -> dict:
    """The model's layers in a few numbers: recipe, executions, how many layers at which bits, bytes."""
    rows = [row for row in describe(model) if row["weight_bits"] is not None]
    bits = collections.Counter(
        "table" if row["execution"] == "table" else f"w{row['weight_bits']}a{row['activation_bits']}" for row in rows
    )
    return {
        "recipe": model.recipe_name or None,
        "execution": sorted({row["execution"] for row in rows}),
        "layers": dict(sorted(bits.items())),
        "bytes": sum(row["bytes"] for row in rows),
        "bfloat16_bytes": sum(row["float_bytes"] for row in rows),
    }


def _devices(mesh: Mesh | None) -> list:
    return jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
