"""Blocks reconstructed one after the other: transforms, roundings or estimates trained towards full precision."""

from qvdjax.ptq.reconstruction.adaptive_rounding import AdaptiveRounding
from qvdjax.ptq.reconstruction.engine import Reconstructed, reconstruct
from qvdjax.ptq.reconstruction.finished import BlockReport, FinishedBlocks
from qvdjax.ptq.reconstruction.plan import Reconstruction
from qvdjax.ptq.reconstruction.token_estimation import TokenEstimation

__all__ = [
    "AdaptiveRounding", "BlockReport", "FinishedBlocks", "Reconstructed", "Reconstruction", "TokenEstimation",
    "reconstruct",
]  # fmt: skip
