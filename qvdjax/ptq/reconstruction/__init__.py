"""Blocks reconstructed one after the other: transforms and clips trained towards full-precision outputs."""

from qvdjax.ptq.reconstruction.engine import Reconstructed, reconstruct
from qvdjax.ptq.reconstruction.finished import BlockReport, FinishedBlocks
from qvdjax.ptq.reconstruction.plan import Reconstruction

__all__ = ["BlockReport", "FinishedBlocks", "Reconstructed", "Reconstruction", "reconstruct"]
