"""A loss on how frames of a stream resemble each other: Q-VDiT's temporal maintenance distillation."""

import jax
import jax.numpy as jnp
from einops import rearrange


def frame_resemblances(x: jax.Array, frames: int) -> jax.Array:
    """Logarithms of the softmax over j of the cosine of frames i and j: x [batch, tokens, width] -> [batch, i, j].

    Tokens come frame by frame. All tokens and channels of a frame are one vector.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    vectors = rearrange(x, "b (f s) d -> b f (s d)", f=frames)
    size = jnp.sqrt((vectors * vectors).sum(axis=-1, keepdims=True) + 1e-30)  # a finite gradient at zero
    vectors = vectors / size
    cosines = jnp.einsum("bid,bjd->bij", vectors, vectors, precision=jax.lax.Precision.HIGHEST)
    return jax.nn.log_softmax(cosines, axis=-1)


def temporal_divergence(candidate: jax.Array, reference: jax.Array, frames: int) -> jax.Array:
    """Sum over frames of the Kullback-Leibler divergence of the candidate's resemblances from the reference's, mean
    over the batch (arXiv 2505.22167, section 3.3): two [batch, tokens, width] of the video's tokens -> []."""
    ours, theirs = frame_resemblances(candidate, frames), frame_resemblances(reference, frames)
    return (jnp.exp(theirs) * (theirs - ours)).sum(axis=(1, 2)).mean()
