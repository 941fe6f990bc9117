"""How many operations a step takes, and the best ratio that quantizing some of them can reach.

Floating-point operations count two for each multiply-add of a matrix product; nothing else is counted. For S
video tokens, T text tokens, width d and hidden width h, one Wan block takes

    linear products   2 S d d x 4 (self-attention) + 2 S d d x 2 + 2 T d d x 2 (cross-attention) + 2 S d h x 2
    QK products       2 S S d + 2 S T d
    PV products       the same

and one CogVideoX or HunyuanVideo block, where text and video are one stream of N = S + T tokens,

    linear products   2 N d d x 4 + 2 N d h x 2
    QK products       2 N N d
    PV products       the same

A video UNet's operations are in `experiments.bench.unet_work`.

A ceiling is Amdahl's law over these shares: if every product took time in proportion to its operations and
those that are quantized ran `factor` times as fast, the whole would run

    1 / (float share + linear share / linear factor + QK share / QK factor + PV share / PV factor),

the share of convolutions likewise, times as fast. The factor is what the device's own int8 and bf16 matrix rates,
measured in the same run, give (for four-bit codes too: they are widened to int8 before the product; of convolutions
where the device multiplies their codes as int8, else 1). The ceiling ignores everything that is no matrix product, so a
measured ratio below it is expected; a ratio above it means that the reference was not at its best.
"""

import dataclasses
import operator
from collections.abc import Collection, Mapping

from experiments.bench.shapes import Shape
from experiments.bench.unet_work import unet_operations
from models.unet_motion_config import UNetMotionConfig


@dataclasses.dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products, by what they are."""

    linear: float = 0.0
    qk: float = 0.0
    pv: float = 0.0
    convolution: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(dataclasses.astuple(self))

    def __add__(self, other: "Work") -> "Work":
        return Work(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, times: float) -> "Work":
        return Work(*(operations * times for operations in dataclasses.astuple(self)))


def linear_work(rows: int, inputs: int, outputs: int) -> Work:
    """One linear layer on `rows` tokens."""
    return Work(linear=2.0 * rows * inputs * outputs)


def attention_work(queries: int, keys: int, width: int) -> Work:
    """The two products of attention over all heads (`width` = heads x head_dim)."""
    product = 2.0 * queries * keys * width
    return Work(qk=product, pv=product)


def block_work(shape: Shape) -> Work:
    """One transformer block."""
    s, t, d, h = shape.tokens, shape.text_tokens, shape.width, shape.hidden
    if shape.joint:
        return linear_work(s + t, d, d) * 4 + attention_work(s + t, s + t, d) + linear_work(s + t, d, h) * 2
    self_attention = linear_work(s, d, d) * 4 + attention_work(s, s, d)
    cross_attention = linear_work(s, d, d) * 2 + linear_work(t, d, d) * 2 + attention_work(s, t, d)
    return self_attention + cross_attention + linear_work(s, d, h) * 2


def step_work(shape: Shape) -> Work:
    """One forward pass; embedders and the output projection (below 1 %) are left out."""
    if isinstance(shape.parsed, UNetMotionConfig):
        convolutions, linear, products = unet_operations(shape.parsed, shape.latents[:3], shape.text_tokens)
        return Work(linear, products, products, convolutions)
    return block_work(shape) * shape.layers


def training_work(forward: Work, *, teacher: bool) -> Work:
    """One training step: forward and backward of the model that is trained and, with a teacher, its forward pass.

    A backward pass counts two forward passes. What remat computes again is not counted, as is usual for "model FLOPs"
    (Chowdhery et al. 2022, arXiv 2204.02311, section 4.1).
    """
    return forward * (4 if teacher else 3)


def ceiling(
    work: Work, *, linear_factor: float = 1.0, qk_factor: float = 1.0, pv_factor: float = 1.0,
    convolution_factor: float = 1.0,
) -> float:  # fmt: skip
    """Largest ratio of reference time to quantized time, each kind of product `factor` times as fast."""
    factors = (linear_factor, qk_factor, pv_factor, convolution_factor)
    return work.total / sum(map(operator.truediv, dataclasses.astuple(work), factors))


def least_seconds(work: Work, rates: Mapping[str, float], quantized: Collection[str] = ()) -> float:
    """What the products take at the measured rates, `float_tera_ops` or, of the kinds that are quantized,
    `int8_tera_ops`."""
    seconds = 0.0
    for kind, operations in dataclasses.asdict(work).items():
        rate = rates["int8_tera_ops" if kind in quantized else "float_tera_ops"]
        seconds += operations / (1e12 * rate)
    return seconds
