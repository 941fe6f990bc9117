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

    AnimateDiff       made by                                     read by                         factors for
    projection        the transformer's group norm                proj_in                         each transformer
    self-attention    norm1 of images                             attn1.to_q, to_k, to_v          each block
    over frames       norm1, norm2 and pos_embed of motion        attn1, attn2: to_q, to_k, to_v  each block
    cross-attention   norm2 of images                             attn2.to_q                      each block
    feed-forward      norm3                                       ff.net.0.proj                   each block
    hidden layer      values (not gates) of ff.net.0.proj         ff.net.2                        each block
    values            attn1.to_v; attn2.to_v                      attn1.to_out.0; attn2.to_out.0  each block

Wan's blocks share the modulation's factors because they share `time_proj`. The input of Wan's `proj_out` has none:
one time embedding is added to its shift and to its scale, and cannot be scaled for one alone. Nor has what lies behind
a nonlinearity that lets no factor through: the hidden layer of a transformer's feed-forward, the convolutions of a
UNet's residual blocks.

A folded factor is what SmoothQuant takes out again: a conclusion about methods needs the plain variant too.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from flax import nnx

import models
from experiments.moving_shapes.outlier_folds import fold_of
from models.pipeline import copy_pipeline
from qvdjax.errors import UserError
from qvdjax.nn import VideoModel


def outlier_variant(
    model: VideoModel, *, seed: int = 0, channels: int = 4, lightest: float = 10.0, heaviest: float = 50.0
) -> VideoModel:
    """A model with heavy channels and, up to rounding, the same function.

    Args:
        model: A float Wan, CogVideoX or AnimateDiff; left as it is.
        seed: Of the channels and factors.
        channels: Heavy channels at each site.
        lightest, heaviest: Their factors are log-uniform between the two.

    Raises:
        UserError: Another model, or one without the affine norms that factors are put into.
    """
    fold, generator = fold_of(model), np.random.default_rng(seed)

    def factors(*shape: int) -> np.ndarray:
        """One vector of factors, or one for each block: (*lead, width) float64, most of them 1."""
        rows = np.ones((int(np.prod(shape[:-1])), shape[-1]))
        for row in rows:
            heavy = generator.choice(row.size, channels, replace=False)
            row[heavy] = np.exp(generator.uniform(np.log(lightest), np.log(heaviest), channels))
        return rows.reshape(shape)

    model = nnx.clone(model)
    fold(model, factors)
    return model


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
