"""qvdjax: quantize video diffusion models in JAX."""

from importlib import import_module

_HOMES = {
    "quantize": "qvdjax.quantization",
    "best_execution": "qvdjax.quantization",
    "describe": "qvdjax.description",
    "tabulate": "qvdjax.tabulation",
    "UserError": "qvdjax.errors",
}

__all__ = ["UserError", "best_execution", "describe", "quantize", "tabulate"]


def __getattr__(name: str):
    """Import on first use: the command line reads `qvdjax.errors` without waiting for JAX."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qvdjax' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
