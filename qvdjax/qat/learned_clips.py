"""Learned clips of dynamic activation ranges (ModelTC/QVGen, `training/quant/quant.py`).

A token's range is taken as it comes and narrowed by learned factors: with P steps, sigmoid s and logits a,

    low = ratio * min(x) * s(a_low)        high = ratio * max(x) * s(a_high)
    scale = (high - low) / P               zero point = clip(-round(low / scale)), no gradient through it

and for a symmetric grid scale = ratio * max|x| * s(a) / (2**(bits - 1) - 1). Minimum and maximum are not detached: a
part of the gradient reaches each token's extreme entries. Left open by the release, and chosen here: a range always
includes zero (its own does not, so that a token of one sign is clipped at high - low), and x / scale + zero point is
rounded at once, as everywhere in this library (rounding before adding differs in exact ties alone).
"""

import math

import jax
import jax.numpy as jnp

from qvdjax.nn import InputClip
from qvdjax.numerics import Quantizer, fake_quantize


def start_logits(clip: InputClip, symmetric: bool) -> jax.Array:
    """Logits whose sigmoid is `clip.start`, float32 [count, sides]; sides is 1 if symmetric, else 2 (low, high)."""
    return jnp.full((clip.count, 1 if symmetric else 2), math.log(clip.start / (1 - clip.start)), jnp.float32)


def table(logits: jax.Array, clip: InputClip) -> jax.Array:
    """Logits [..., count, sides] -> the factors of the range's ends, of the same shape."""
    return clip.ratio * jax.nn.sigmoid(logits)


def fake_quantize_clipped(x: jax.Array, quantizer: Quantizer, clip: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Fake-quantize x [..., tokens, in] with its present range narrowed by `clip`, which is learned.

    Equal to `fake_quantize_dynamic` with the same clip; here the range takes part in the gradient. With q the code and
    in = whether it was not clipped, that of x^ towards the scale is (q - z) - in x / scale.

    Args:
        x: Activations, rounded one range a token (or as `quantizer` says).
        quantizer: Of dynamic ranges.
        clip: Factors of the low and the high end, from `InputClip.factors`.
    """
    return fake_quantize(x, quantizer.grid, *quantizer.scale_of(x, clip))
