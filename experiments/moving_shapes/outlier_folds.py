"""Where heavy channels can be folded into each family without changing its function; `outlier` has the table."""

from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from models.cogvideox import CogVideoXModel
from models.unet_motion import UNetMotionModel
from models.unet_transformers import SpatialTransformer, TemporalBlock, TemporalTransformer
from models.wan import WanModel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel
from qvdjax.nn.variables import iterate

Factors = Callable[..., np.ndarray]
"""factors(*lead, width) -> factors of channels, (*lead, width) float64, most of them 1."""


def fold_of(model: VideoModel) -> Callable[[VideoModel, Factors], None]:
    """What folds factors into models such as this one, in place.

    Raises:
        UserError: Another model, or one without the affine norms that factors are put into.
    """
    config = model.config
    if isinstance(model, WanModel) and config.cross_attn_norm:
        return _fold_into_wan
    if isinstance(model, CogVideoXModel) and config.norm_elementwise_affine:
        return _fold_into_cogvideox
    if isinstance(model, UNetMotionModel):
        return _fold_into_animatediff
    raise UserError(
        "outlier channels are known for models whose norms have weights",
        remedy="use a Wan with cross_attn_norm, a CogVideoX with norm_elementwise_affine or an AnimateDiff",
    )


def _fold_into_wan(model: WanModel, factors: Factors) -> None:
    embedder, width = model.condition_embedder, model.config.width
    attention, feed_forward, text = (factors(width) for _ in range(3))
    chunks = np.ones((6, width))  # shift, scale, gate, c_shift, c_scale, c_gate
    chunks[[0, 1]], chunks[[3, 4]] = attention, feed_forward
    _scale_outputs(embedder.time_proj, chunks.reshape(-1))
    _scale_outputs(embedder.text_embedder["linear_2"], text)
    for stack in model.stacks:
        block = stack.block
        # 1 + table + time becomes s (1 + table + time) when time becomes s time and table s table + s - 1.
        table = block.scale_shift_table
        extra = np.zeros((6, width))
        extra[[1, 4]] = chunks[[1, 4]] - 1
        _change(table, lambda value, extra=extra: value * chunks + extra)  # (layers, 1, 6, width)
        for reader in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            _divide_inputs(reader, attention)
        _divide_inputs(block.ffn.net["0"]["proj"], feed_forward)
        cross = factors(stack.count, width)
        _scale_norm(block.norm2, cross)
        _divide_inputs(block.attn2.to_q, cross)
        for reader in (block.attn2.to_k, block.attn2.to_v):
            _divide_inputs(reader, text)
        for site in (block.attn1, block.attn2):
            _scale_values(site, factors(stack.count, width))


def _fold_into_cogvideox(model: CogVideoXModel, factors: Factors) -> None:
    width = model.config.width
    for stack in model.stacks:
        block = stack.block
        attention, feed_forward = (factors(stack.count, width) for _ in range(2))
        attn1 = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        for norm, own, readers in (
            (block.norm1, attention, attn1), (block.norm2, feed_forward, (block.ff.net["0"]["proj"],)),
        ):  # fmt: skip
            _scale_norm(norm.norm, own)
            chunks = np.ones((stack.count, 6, own.shape[-1]))  # shift, scale, gate of video, then of text
            chunks[:, [0, 3]] = own[:, None]
            _scale_outputs(norm.linear, chunks.reshape(stack.count, -1))
            for reader in readers:
                _divide_inputs(reader, own)
        _scale_values(block.attn1, factors(stack.count, width))


def _fold_into_animatediff(model: UNetMotionModel, factors: Factors) -> None:
    for _, transformer in iterate(model, (SpatialTransformer, TemporalTransformer)):
        channels = factors(transformer.norm.weight.shape[0])
        _scale_norm(transformer.norm, channels)
        _divide_inputs(transformer.proj_in, channels)
        block = transformer.transformer_blocks["0"]
        width = block.norm1.weight.shape[0]
        own, other, feed_forward = (factors(width) for _ in range(3))
        if isinstance(block, TemporalBlock):
            other = own  # one table of positions is added to both
            if block.pos_embed is not None:
                _change(block.pos_embed.pe, lambda value, own=own: value * own)
            readers = (block.attn2.to_q, block.attn2.to_k, block.attn2.to_v)
        else:
            readers = (block.attn2.to_q,)  # its keys and values are the text's
        _scale_norm(block.norm1, own)
        for reader in (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v):
            _divide_inputs(reader, own)
        _scale_norm(block.norm2, other)
        for reader in readers:
            _divide_inputs(reader, other)
        _scale_norm(block.norm3, feed_forward)
        _divide_inputs(block.ff.net["0"]["proj"], feed_forward)
        hidden = factors(4 * width)
        _scale_outputs(block.ff.net["0"]["proj"], np.concatenate([hidden, np.ones(4 * width)]))  # values, gates
        _divide_inputs(block.ff.net["2"], hidden)
        for attention in (block.attn1, block.attn2):
            _scale_values(attention, factors(width))


def _scale_norm(norm, factors: np.ndarray) -> None:
    """Multiply what an affine norm makes; weight and bias ([layers,] width), as factors."""
    for variable in (norm.weight, norm.bias):
        _change(variable, lambda value: value * factors)


def _scale_values(attention, factors: np.ndarray) -> None:
    """Multiply the values of an attention, and divide where their mixture is read."""
    _scale_outputs(attention.to_v, factors)
    _divide_inputs(attention.to_out["0"], factors)


def _change(variable: nnx.Variable, function) -> None:
    """Replace a variable's value, computed in float64."""
    value = variable[...]
    variable[...] = jax.numpy.asarray(function(np.asarray(value, np.float64)), value.dtype)


def _scale_outputs(linear, factors: np.ndarray) -> None:
    """Multiply output channels; weight (..., out, in), bias and factors (..., out)."""
    _change(linear.weight, lambda value: value * factors[..., :, None])
    if linear.bias is not None:
        _change(linear.bias, lambda value: value * factors)


def _divide_inputs(linear, factors: np.ndarray) -> None:
    """Divide input channels; weight (..., out, in, *kernel), factors (..., in)."""
    kernel = len(linear.weight.get_metadata("axes")) - 2
    divisors = factors[..., None, :].reshape(*factors.shape[:-1], 1, -1, *[1] * kernel)  # ... 1 in *kernel
    _change(linear.weight, lambda value: value / divisors)
