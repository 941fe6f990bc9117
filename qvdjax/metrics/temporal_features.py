"""How well rounded temporal features still tell timesteps apart.

QVD (arXiv 2407.11585) speaks of discriminability and of a score for it, whose formula was not at hand. These are the
measures that stand in for it; none of them is the paper's. A ratio of distances alone can be raised by noise, so it is
reported beside the others and decides nothing.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Discriminability:
    """What rounding did to the features of T timesteps.

    Attributes:
        identity_rate: Share of timesteps whose rounded feature is nearest to their own feature, of all T; in 0..1.
        collapse: Share of the numbers that differ between a timestep and the next, but no longer when rounded; 0..1.
        centred_sqnr_db: Signal-to-quantization-noise ratio in decibels, the signal being what is left of the features
            when their mean over timesteps is taken off: only that tells timesteps apart.
        distance_ratio: Mean distance between rounded features over the mean distance between features; 1 is kept, less
            is levelled out.
    """

    identity_rate: float
    collapse: float
    centred_sqnr_db: float
    distance_ratio: float


def discriminability(features: jax.Array, rounded: jax.Array) -> Discriminability:
    """Compare features [timesteps, in] with what they became, in the order of the timesteps.

    Raises:
        ValueError: Fewer than two timesteps, or shapes that differ.
    """
    if features.shape != rounded.shape or features.ndim != 2 or len(features) < 2:
        raise ValueError(f"features {features.shape} and rounded {rounded.shape}: give at least two timesteps of both")
    return Discriminability(*(float(value) for value in _measures(features, rounded)))


@jax.jit
def _measures(features, rounded):
    def distances(a, b):
        return jnp.linalg.norm(a[:, None] - b[None], axis=-1)  # [timesteps, timesteps]

    own = distances(rounded, features).argmin(axis=1) == jnp.arange(len(features))
    differ = features[1:] != features[:-1]
    same = differ & (rounded[1:] == rounded[:-1])
    centred = features - features.mean(axis=0)
    noise = jnp.square(rounded - features).sum()
    ratio = jnp.square(centred).sum() / noise
    kept = distances(rounded, rounded).sum() / distances(features, features).sum()
    return own.mean(), same.sum() / jnp.maximum(differ.sum(), 1), 10 * jnp.log10(ratio), kept
