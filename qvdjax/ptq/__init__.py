"""Post-training quantization: transforms, ranges and rounding, applied to a model."""

from qvdjax.ptq.absorb import absorb_rotations, absorb_scales
from qvdjax.ptq.apply import apply_schemes, set_execution
from qvdjax.ptq.bit_switch import SwitchBits, with_switched_bits
from qvdjax.ptq.channel_bits import ChannelBits, share_out_channels
from qvdjax.ptq.feature_grids import ChooseGrid, fill_feature_grids, fit_feature_grids
from qvdjax.ptq.frame_gains import with_gains
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.layers import quantize_layer
from qvdjax.ptq.range_search import RangeSearch, search_ranges, with_counts
from qvdjax.ptq.reconstruction import Reconstruction, reconstruct
from qvdjax.ptq.rounding import rounded_layers
from qvdjax.ptq.scale_search import search_scales
from qvdjax.ptq.timestep_scales import TimestepScales, timestep_ranges
from qvdjax.ptq.transforms import (
    FitChannelScale,
    FitEvenChannels,
    FitProduct,
    FitRotation,
    FitShift,
    SearchScale,
    with_shifts_of_timesteps,
)

__all__ = [
    "ChannelBits",
    "ChooseGrid",
    "ErrorCompensation",
    "FitChannelScale",
    "FitEvenChannels",
    "FitProduct",
    "FitRotation",
    "FitShift",
    "RangeSearch",
    "Reconstruction",
    "SearchScale",
    "SwitchBits",
    "TimestepScales",
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
    "share_out_channels",
    "timestep_ranges",
    "with_counts",
    "with_gains",
    "with_shifts_of_timesteps",
    "with_switched_bits",
]
