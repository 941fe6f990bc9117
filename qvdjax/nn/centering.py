"""What the tokens of a sample have in common, taken off an input before it is rounded."""

import dataclasses
from collections.abc import Callable

import jax

from qvdjax.numerics import QTensor, Quantizer, encode, fake_quantize_dynamic


@dataclasses.dataclass(frozen=True)
class Centering:
    """An input X becomes X - c and c, with c the mean of a sample's tokens, rounded: X W^T = (X - c) W^T + c W^T.

    What is rounded to few bits is then how tokens differ, which of video is less than what they are; c meets the same
    codes of the weight in a product of one row a sample. Its own rounding is no error: X - c is of what was rounded.
    DeltaQuant (CVPR 2026) does so for cubes of neighbouring tokens, in floats of 8 and 4 bits; this is its cube of all
    tokens, in integers.

    Attributes:
        bits: Of c, with one symmetric range a sample.
    """

    bits: int = 8

    def __post_init__(self):
        if not 2 <= self.bits <= 8:
            raise ValueError(f"the mean of tokens has 2 to 8 bits, not {self.bits}")

    @property
    def quantizer(self) -> Quantizer:
        """Of c."""
        return Quantizer(self.bits, granularity="token", dynamic=True)

    def encoded(self, x: jax.Array) -> QTensor:
        """x [..., tokens, in] -> the codes of c [..., 1, in]; of vectors [batch, in], each a sample's only token,
        [batch, in]."""
        return encode(mean := _mean(x), self.quantizer.grid, *self.quantizer.scale_of(mean))

    def rounded(self, x: jax.Array) -> jax.Array:
        """The same as floats; gradients pass straight through the rounding."""
        return fake_quantize_dynamic(_mean(x), self.quantizer)


def rounded_apart(centering: Centering | None, x: jax.Array, rounded: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """x [..., tokens, in] by `rounded`, its centre apart where there is one."""
    if centering is None:
        return rounded(x)
    center = centering.rounded(x)
    return rounded(x - center) + center


def _mean(x: jax.Array) -> jax.Array:
    return x if x.ndim == 2 else x.mean(axis=-2, keepdims=True)  # [..., tokens, in] -> [..., 1, in]
