"""fp8-*: round to the nearest floating-point number of eight bits."""

import dataclasses

from qvdjax.numerics.float8 import FLOAT8
from qvdjax.recipes.method import FLOAT_ACTIVATION_BITS, Method


@dataclasses.dataclass(frozen=True)
class Float8(Method):
    """rtn with float8_e4m3fn in the place of even grids: for chips that multiply it, such as TPU v7x and NVIDIA's from
    Hopper on. Elsewhere the same numbers are multiplied as bfloat16, which holds them exactly.

    One range an output channel of a weight and a token of an input, the largest value of which becomes 448. There are
    only fp8-w8a8, and fp8-w8a16 for float inputs. Convolutions stay float, and products within attention are of float8
    where they are asked for. Needs no calibration.
    Source: Micikevicius et al., FP8 formats for deep learning (arXiv 2209.05433).
    Command: `qvdjax quantize DIR OUT --recipe fp8-w8a8`.
    Expected: an error of about 31.5 dB below a number whatever its size: behind rtn-w8a8 where values are alike, ahead
    of it where a few are some dozen times as large as the rest (docs/quantize.md has both).
    """

    codebook: str | None = FLOAT8
    attention_codebook: str | None = FLOAT8

    name = "fp8"
    preset_bits = ((8, 8), (8, FLOAT_ACTIVATION_BITS))
