"""Steps compiled for TPU slices that are not here: do they fit, and what do their chips exchange."""

from experiments.planning.job import plan

__all__ = ["plan"]
