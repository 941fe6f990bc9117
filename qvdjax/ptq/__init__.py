"""Post-training quantization: transforms, ranges and rounding, applied to a model."""

from qvdjax.ptq.absorb import absorb_rotations
from qvdjax.ptq.apply import apply_schemes, set_execution
from qvdjax.ptq.gptq import ErrorCompensation
from qvdjax.ptq.layers import quantize_layer
from qvdjax.ptq.reconstruction import Reconstruction, reconstruct
from qvdjax.ptq.rounding import rounded_layers
from qvdjax.ptq.transforms import FitChannelScale, FitProduct, FitRotation

__all__ = [
    "ErrorCompensation",
    "FitChannelScale",
    "FitProduct",
    "FitRotation",
    "Reconstruction",
    "absorb_rotations",
    "apply_schemes",
    "quantize_layer",
    "reconstruct",
    "rounded_layers",
    "set_execution",
]
