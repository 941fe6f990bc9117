"""Layers with one interface in float, simulated and integer execution, and the protocol models are written to."""

from qvdjax.nn.attention import Attention, dot_product_attention, quantized_attention, with_float_attention
from qvdjax.nn.bit_switch import BitSwitch
from qvdjax.nn.centering import Centering, rounded_apart
from qvdjax.nn.conv import Conv, QuantizedConv
from qvdjax.nn.frames import FrameAxis
from qvdjax.nn.input_clip import InputClip
from qvdjax.nn.interval_linear import IntervalLinear
from qvdjax.nn.layers import FLOAT_LAYERS, QUANTIZED_LAYERS, TABLE_LAYERS, layers_of
from qvdjax.nn.linear import Linear, QuantizedLinear
from qvdjax.nn.low_rank import LowRank, LowRankBranch
from qvdjax.nn.norm import GroupNorm, LayerNorm, RMSNorm, at_least_float32
from qvdjax.nn.partial_block import PartialBlock
from qvdjax.nn.protocol import Stack, VideoModel, at_timestep, for_one_call, stacked
from qvdjax.nn.scheme import EXECUTIONS, AttentionScheme, Execution, LayerScheme, Role, TableScheme
from qvdjax.nn.stand_in import StandIn
from qvdjax.nn.swap import swap_layers
from qvdjax.nn.timestep import PerCall, TimestepReader
from qvdjax.nn.timestep_intervals import TimestepIntervals
from qvdjax.nn.timestep_table import TimestepTable, check_timesteps, refuse_tables, tables_of
from qvdjax.nn.token_estimator import EstimatorBranch, TokenEstimator
from qvdjax.nn.transforms import InputTransform, Kronecker, Rotation
from qvdjax.nn.values import CarriesValues
from qvdjax.nn.variables import Buffer, Codes, Param, Scale, Statistic, Table

__all__ = [
    "EXECUTIONS",
    "FLOAT_LAYERS",
    "QUANTIZED_LAYERS",
    "TABLE_LAYERS",
    "Attention",
    "AttentionScheme",
    "BitSwitch",
    "Buffer",
    "CarriesValues",
    "Centering",
    "Codes",
    "Conv",
    "EstimatorBranch",
    "Execution",
    "FrameAxis",
    "GroupNorm",
    "InputClip",
    "InputTransform",
    "IntervalLinear",
    "Kronecker",
    "LayerNorm",
    "LayerScheme",
    "Linear",
    "LowRank",
    "LowRankBranch",
    "Param",
    "PartialBlock",
    "PerCall",
    "QuantizedConv",
    "QuantizedLinear",
    "RMSNorm",
    "Role",
    "Rotation",
    "Scale",
    "Stack",
    "StandIn",
    "Statistic",
    "Table",
    "TableScheme",
    "TimestepIntervals",
    "TimestepReader",
    "TimestepTable",
    "TokenEstimator",
    "VideoModel",
    "at_least_float32",
    "at_timestep",
    "check_timesteps",
    "dot_product_attention",
    "for_one_call",
    "layers_of",
    "quantized_attention",
    "refuse_tables",
    "rounded_apart",
    "stacked",
    "swap_layers",
    "tables_of",
    "with_float_attention",
]
