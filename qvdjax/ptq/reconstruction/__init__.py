"""Blocks reconstructed one after the other: transforms and clips, or roundings, trained towards full precision."""

from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptiveRounding
from qvdjax.ptq.reconstruction.engine import Reconstructed, reconstruct
from qvdjax.ptq.reconstruction.finished import BlockReport, FinishedBlocks
from qvdjax.ptq.reconstruction.plan import Reconstruction

__all__ = ["AdaptiveRounding", "BlockReport", "FinishedBlocks", "Reconstructed", "Reconstruction", "reconstruct"]
