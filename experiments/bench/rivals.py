"""Other programs' ways to compute what the bench times, in the same run where they are installed.

PyTorch (bfloat16 with its scaled_dot_product_attention, torch.compile), torchao (int8, inputs rounded dynamically),
diffusers' own Wan and qwix. This is the one module of the bench that imports them, when it is asked to. PyTorch runs on
the GPU where it has one. Leave it memory: run with `XLA_PYTHON_CLIENT_PREALLOCATE=false`.
"""

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.bench.shapes import Shape

PACKAGES = ("torch", "torchao", "diffusers", "qwix")


@dataclasses.dataclass(frozen=True)
class Rival:
    """One of them.

    Attributes:
        label: Such as "torch-sdpa".
        packages: What has to be installed.
        make: Gives what is called and its arguments; of PyTorch where `is_torch`, else of jax, which is jitted.
    """

    label: str
    packages: tuple[str, ...]
    make: Callable[[], tuple[Callable, tuple]]
    is_torch: bool = True

    @property
    def missing(self) -> list[str]:
        """Packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


class TorchTimed:
    """A PyTorch function ready to be called again and again, with the interface of `timing.Timed`."""

    def __init__(self, function: Callable, *arguments):
        self._torch = importlib.import_module("torch")
        self._function, self._arguments = function, arguments
        begin = time.perf_counter()
        self._call()
        self._wait()
        self.compile_seconds = time.perf_counter() - begin
        self.output = None

    def sample(self, calls: int) -> float:
        """Seconds a call, over `calls` calls queued one after the other and waited for together."""
        begin = time.perf_counter()
        for _ in range(calls):
            self._call()
        self._wait()
        return (time.perf_counter() - begin) / calls

    def _call(self):
        with self._torch.inference_mode():
            return self._function(*self._arguments)

    def _wait(self):
        if self._torch.cuda.is_available():
            self._torch.cuda.synchronize()


def versions() -> dict[str, str | None]:
    """Of the rivals; None where one is not installed."""
    found = {}
    for name in PACKAGES:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def linear_rivals(rows: int, inputs: int, outputs: int, dtype) -> tuple[Rival, ...]:
    """One linear layer on x [1, rows, inputs], its input's rounding included where it is quantized."""

    def plain(compiled: bool, quantized: bool):
        torch = importlib.import_module("torch")
        x = _random(torch, (1, rows, inputs), dtype)
        layer = torch.nn.Linear(inputs, outputs).to(device=x.device, dtype=x.dtype)
        if quantized:
            api = importlib.import_module("torchao.quantization")
            api.quantize_(layer, api.Int8DynamicActivationInt8WeightConfig())
        return (torch.compile(layer) if compiled else layer), (x,)

    def qwix():
        package = importlib.import_module("qwix")
        x = jax.random.normal(jax.random.key(1), (rows, inputs), jnp.float32).astype(dtype)
        weight = jax.random.normal(jax.random.key(2), (inputs, outputs), jnp.float32)
        codes = package.quantize(weight, jnp.int8, channelwise_axes=(1,))

        def call(x, codes):
            return package.dot(package.quantize(x, jnp.int8, channelwise_axes=(0,)), codes)

        return call, (x, codes)

    return (
        Rival("torch", ("torch",), lambda: plain(compiled=False, quantized=False)),
        Rival("torch-compile", ("torch",), lambda: plain(compiled=True, quantized=False)),
        Rival("torchao-int8-dynamic", ("torch", "torchao"), lambda: plain(compiled=True, quantized=True)),
        Rival("qwix-int8", ("qwix",), qwix, is_torch=False),
    )


def attention_rivals(size: tuple[int, int, int, int], dtype) -> tuple[Rival, ...]:
    """Attention on arrays of a size (batch, tokens, heads, head_dim)."""

    def plain():
        torch = importlib.import_module("torch")
        batch, tokens, heads, head_dim = size
        arrays = [_random(torch, (batch, heads, tokens, head_dim), dtype) for _ in range(3)]
        return torch.nn.functional.scaled_dot_product_attention, tuple(arrays)

    return (Rival("torch-sdpa", ("torch",), plain),)


def step_rivals(shape: Shape, dtype) -> tuple[Rival, ...]:
    """A forward pass of diffusers' own model with random weights; of Wan, whose inputs are three arrays."""
    if shape.config["_class_name"] != "WanTransformer3DModel":
        return ()

    def plain(compiled: bool):
        torch, diffusers = (importlib.import_module(name) for name in ("torch", "diffusers"))
        frames, height, width, channels = shape.latents
        latents = _random(torch, (1, channels, frames, height, width), dtype)
        fields = {key: value for key, value in shape.config.items() if not key.startswith("_")}
        with torch.device(latents.device):
            model = diffusers.WanTransformer3DModel(**fields).to(latents.dtype).eval()
        context = _random(torch, (1, shape.text_tokens, shape.parsed.text_dim), dtype)
        timestep = torch.full((1,), 500.0, device=latents.device)
        called = torch.compile(model) if compiled else model
        return lambda *inputs: called(*inputs, return_dict=False)[0], (latents, timestep, context)

    packages = ("torch", "diffusers")
    return (
        Rival("diffusers", packages, lambda: plain(compiled=False)),
        Rival("diffusers-compile", packages, lambda: plain(compiled=True)),
    )


def _random(torch, size: tuple[int, ...], dtype):
    """Normal numbers on the GPU where PyTorch has one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randn(size, device=device, dtype=getattr(torch, jnp.dtype(dtype).name))
