"""Post-training quantization: transforms, ranges and rounding, applied to a model."""

from qvdjax.ptq.absorb import absorb_rotations, absorb_scales
from qvdjax.ptq.apply import apply_schemes, set_execution
from qvdjax.ptq.bit_switch import SwitchBits, with_switched_bits
from qvdjax.ptq.feature_grids import ChooseGrid, fill_feature_grids, fit_feature_grids
from qvdjax.ptq.frame_gains import with_gains
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.layers import quantize_layer
from qvdjax.ptq.range_search import RangeSearch, search_ranges, with_counts
from qvdjax.ptq.reconstruction import Reconstruction, reconstruct
from qvdjax.ptq.rounding import rounded_layers
from qvdjax.ptq.scale_search import search_scales
from qvdjax.ptq.transforms import FitChannelScale, FitProduct, FitRotation, FitShift, SearchScale

__all__ = [
    "ChooseGrid",
    "ErrorCompensation",
    "FitChannelScale",
    "FitProduct",
    "FitRotation",
    "FitShift",
    "RangeSearch",
    "Reconstruction",
    "SearchScale",
    "SwitchBits",
    "absorb_rotations",
    "absorb_scales",
    "apply_schemes",
    "fill_feature_grids",
    "fit_feature_grids",
    "quantize_layer",
    "reconstruct",
    "rounded_layers",
    "search_ranges",
    "search_scales",
    "set_execution",
    "with_counts",
    "with_gains",
    "with_switched_bits",
]
