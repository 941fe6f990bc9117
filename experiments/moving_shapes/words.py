"""The word table: one fixed vector a word; `models.pipeline` keeps it in the model folder."""

import functools
from typing import Final

import numpy as np

from experiments.moving_shapes.captions import TOKENS, WORDS, all_captions

WIDTH: Final = 64  # text_dim of the bench models


@functools.cache
def embeddings() -> np.ndarray:
    """float32 (words, 64): exactly orthogonal rows of +1 and -1, the same on every machine.

    Rows of Sylvester's Hadamard matrix with one random sign a column. The signs matter: without them a
    Hadamard rotation (QuaRot) would turn a word into a single spike.
    """
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < WIDTH:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = np.where(np.random.default_rng(0).integers(0, 2, WIDTH) == 1, 1.0, -1.0).astype(np.float32)
    table = hadamard[1 : len(WORDS) + 1] * signs
    table.setflags(write=False)
    return table


@functools.cache
def caption_contexts() -> np.ndarray:
    """Contexts of `all_captions()`, float32 (captions, 8 tokens, 64); unused tokens are zero."""
    table = embeddings()
    contexts = np.zeros((len(all_captions()), TOKENS, WIDTH), np.float32)
    for row, caption in enumerate(all_captions()):
        words = [WORDS.index(word) for word in str(caption).split()]
        contexts[row, : len(words)] = table[words]
    contexts.setflags(write=False)
    return contexts
