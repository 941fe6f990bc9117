"""The outlier variant of a bench model: the same function, computed through heavy channels.

    python -m experiments.moving_shapes.outlier FOLDER OUT [--seed 0] [--channels 4] [--heaviest 50]

Real DiTs have a few activation channels that are tens of times larger than the rest, the same in every token;
small models do not grow them. Here they are folded in: at each site below a few channels are multiplied by a
factor where they are made and divided by it where they are read.

    Wan               made by                                     read by                         factors for
    self-attention    modulation, chunks shift and scale          attn1.to_q, to_k, to_v          all blocks
    feed-forward      modulation, chunks c_shift and c_scale      ffn.net.0.proj                  all blocks
    cross-attention   norm2 weight and bias                       attn2.to_q                      each block
    text              condition_embedder.text_embedder.linear_2   attn2.to_k, attn2.to_v          all blocks
    values            attn1.to_v; attn2.to_v                      attn1.to_out.0; attn2.to_out.0  each block

    CogVideoX         made by                                     read by                         factors for
    attention         norm1: norm, and shifts of its modulation   attn1.to_q, to_k, to_v          each block
    feed-forward      norm2: norm, and shifts of its modulation   ff.net.0.proj                   each block
    values            attn1.to_v                                  attn1.to_out.0                  each block

Wan's blocks share the modulation's factors because they share `time_proj`. The input of Wan's `proj_out` has none:
one time embedding is added to its shift and to its scale, and cannot be scaled for one alone. Nor has the
hidden layer of the feed-forward, whose nonlinearity lets no factor through.

A folded factor is what SmoothQuant takes out again: a conclusion about methods needs the plain variant too.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import models
from models.cogvideox import CogVideoXModel
from models.pipeline import copy_pipeline
from models.wan import WanModel
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel

Factors = Callable[..., np.ndarray]
"""factors(*lead) -> factors of channels, (*lead, width) float64, most of them 1."""


def outlier_variant(
    model: VideoModel, *, seed: int = 0, channels: int = 4, lightest: float = 10.0, heaviest: float = 50.0
) -> VideoModel:
    """A model with heavy channels and, up to rounding, the same function.

    Args:
        model: A float Wan or CogVideoX; left as it is.
        seed: Of the channels and factors.
        channels: Heavy channels at each site.
        lightest, heaviest: Their factors are log-uniform between the two.

    Raises:
        UserError: Another model, or one without the affine norms that factors are put into.
    """
    config = model.config
    if isinstance(model, WanModel) and config.cross_attn_norm:
        fold = _fold_into_wan
    elif isinstance(model, CogVideoXModel) and config.norm_elementwise_affine:
        fold = _fold_into_cogvideox
    else:
        remedy = "use a Wan with cross_attn_norm or a CogVideoX with norm_elementwise_affine"
        raise UserError("outlier channels are known for models whose norms have weights", remedy=remedy)
    generator, width = np.random.default_rng(seed), config.width

    def factors(*lead: int) -> np.ndarray:
        """One vector of factors, or one for each block: (*lead, width) float64."""
        rows = np.ones((int(np.prod(lead)), width))
        for row in rows:
            heavy = generator.choice(width, channels, replace=False)
            row[heavy] = np.exp(generator.uniform(np.log(lightest), np.log(heaviest), channels))
        return rows.reshape(*lead, width)

    model = nnx.clone(model)
    fold(model, factors)
    return model


def _fold_into_wan(model: WanModel, factors: Factors) -> None:
    embedder, width = model.condition_embedder, model.config.width
    attention, feed_forward, text = factors(), factors(), factors()
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
        cross = factors(stack.count)  # (layers, width)
        _scale_norm(block.norm2, cross)
        _divide_inputs(block.attn2.to_q, cross)
        for reader in (block.attn2.to_k, block.attn2.to_v):
            _divide_inputs(reader, text)
        for site in (block.attn1, block.attn2):
            _scale_values(site, factors(stack.count))


def _fold_into_cogvideox(model: CogVideoXModel, factors: Factors) -> None:
    for stack in model.stacks:
        block = stack.block
        attention, feed_forward = factors(stack.count), factors(stack.count)  # (layers, width)
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
        _scale_values(block.attn1, factors(stack.count))


def _scale_norm(norm, factors: np.ndarray) -> None:
    """Multiply what an affine norm makes; weight and bias (layers, width), as factors."""
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
    _change(linear.bias, lambda value: value * factors)


def _divide_inputs(linear, factors: np.ndarray) -> None:
    """Divide input channels; weight (..., out, in), factors (..., in)."""
    _change(linear.weight, lambda value: value / factors[..., None, :])


def main(argv: list[str] | None = None) -> None:
    """Write the outlier variant of a model folder."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.moving_shapes.outlier", description=main.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("folder", type=Path, help="bench model")
    add("out", type=Path, help="new folder")
    add("--seed", type=int, default=0, help="of channels and factors")
    add("--channels", type=int, default=4, help="heavy channels at each site")
    add("--heaviest", type=float, default=50.0, help="largest factor")
    options = vars(parser.parse_args(argv))
    folder, out = options.pop("folder"), options.pop("out")
    models.save(outlier_variant(models.load(folder), **options), out)
    copy_pipeline(folder, out)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"outlier: {error}", file=sys.stderr)
        sys.exit(2)
