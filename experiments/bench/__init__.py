"""Timings of quantized against full-precision layers at real shapes, and the page made from them."""

from importlib import import_module

SUITES = (
    "default", "full", "tiny", "tiny-cogvideox", "tiny-hunyuanvideo", "tiny-animatediff", "wan2.1-1.3b-480p",
    "wan2.1-14b-480p", "wan2.1-1.3b-720p", "wan2.1-14b-720p", "cogvideox-2b-480p", "cogvideox-5b-480p",
    "hunyuanvideo-720p", "animatediff-512",
)  # fmt: skip

__all__ = ["SUITES", "run", "run_bench"]


def __getattr__(name: str):
    """Import on first use: naming the suites needs no jax."""
    if name not in ("run", "run_bench"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("experiments.bench.bench"), name)
