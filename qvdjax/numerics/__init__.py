"""Which integers a method produces, and how they lie in memory and on disk."""

from qvdjax.numerics.feature_grid import FeatureGrid, to_levels
from qvdjax.numerics.grid import BITS, Grid
from qvdjax.numerics.qtensor import QTensor, encode, quantize, sqnr_db, storage_dtype
from qvdjax.numerics.quantizer import Quantizer
from qvdjax.numerics.straight_through import fake_quantize, fake_quantize_dynamic

__all__ = [
    "BITS",
    "FeatureGrid",
    "Grid",
    "QTensor",
    "Quantizer",
    "encode",
    "fake_quantize",
    "fake_quantize_dynamic",
    "quantize",
    "sqnr_db",
    "storage_dtype",
    "to_levels",
]
