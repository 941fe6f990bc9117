"""The outlier variant of a bench model: the same function, computed through heavy channels.

    python -m experiments.moving_shapes.outlier FOLDER OUT [--seed 0] [--channels 4] [--heaviest 50]

Real DiTs have a few activation channels that are tens of times larger than the rest, the same in every token;
small models do not grow them. Here they are folded in: at each site below a few channels are multiplied by a
factor where they are made and divided by it where they are read.

    site              made by                                     read by                         factors for
    self-attention    modulation, chunks shift and scale          attn1.to_q, to_k, to_v          all blocks
    feed-forward      modulation, chunks c_shift and c_scale      ffn.net.0.proj                  all blocks
    cross-attention   norm2 weight and bias                       attn2.to_q                      each block
    text              condition_embedder.text_embedder.linear_2   attn2.to_k, attn2.to_v          all blocks
    values            attn1.to_v; attn2.to_v                      attn1.to_out.0; attn2.to_out.0  each block

The blocks share the modulation's factors because they share `time_proj`. The input of `proj_out` has none:
one time embedding is added to its shift and to its scale, and cannot be scaled for one alone. Nor has the
hidden layer of the feed-forward, whose nonlinearity lets no factor through.

A folded factor is what SmoothQuant takes out again: a conclusion about methods needs the plain variant too.
"""

import argparse
import sys
from pathlib import Path

import jax
import numpy as np
from flax import nnx

import models
from models.pipeline import copy_pipeline
from models.wan import WanModel
from qvdjax.errors import UserError


def outlier_variant(
    model: WanModel, *, seed: int = 0, channels: int = 4, lightest: float = 10.0, heaviest: float = 50.0
) -> WanModel:
    """A Wan model with heavy channels and, up to rounding, the same function.

    Args:
        model: In float; left as it is.
        seed: Of the channels and factors.
        channels: Heavy channels at each site.
        lightest, heaviest: Their factors are log-uniform between the two.

    Raises:
        UserError: The model is not a Wan with an affine `norm2`.
    """
    if not isinstance(model, WanModel) or not model.config.cross_attn_norm:
        raise UserError("outlier channels are known for Wan models with cross_attn_norm", remedy="use such a model")
    generator, width = np.random.default_rng(seed), model.config.width

    def factors(*lead: int) -> np.ndarray:
        """One vector of factors, or one for each block: (*lead, width) float64."""
        rows = np.ones((int(np.prod(lead)), width))
        for row in rows:
            heavy = generator.choice(width, channels, replace=False)
            row[heavy] = np.exp(generator.uniform(np.log(lightest), np.log(heaviest), channels))
        return rows.reshape(*lead, width)

    model = nnx.clone(model)
    embedder = model.condition_embedder
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
        _change(block.norm2.weight, lambda value, s=cross: value * s)
        _change(block.norm2.bias, lambda value, s=cross: value * s)
        _divide_inputs(block.attn2.to_q, cross)
        for reader in (block.attn2.to_k, block.attn2.to_v):
            _divide_inputs(reader, text)
        for site in (block.attn1, block.attn2):
            values = factors(stack.count)  # (layers, heads x head_dim)
            _scale_outputs(site.to_v, values)
            _divide_inputs(site.to_out["0"], values)
    return model


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
