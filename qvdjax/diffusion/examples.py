"""What a model is trained on, by the kind of diffusion: noisy latents, and what it should predict from them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qvdjax.diffusion.schedule import TRAIN_TIMESTEPS, shifted


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Example:
    """A batch to train on.

    Attributes:
        latents: What the model sees, (batch, frames, height, width, channels).
        timestep: What it is told, float32 (batch,) in 0..1000.
        target: What it should predict, shaped as the latents.
    """

    latents: jax.Array
    timestep: jax.Array
    target: jax.Array


def flow_example(clean: jax.Array, noise: jax.Array, uniform: jax.Array, shift: float) -> Example:
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003), at levels spread as a sampler with this shift visits them.

    With s = shift u / (1 + (shift - 1) u) the latents are (1 - s) clean + s noise, the target is the velocity
    noise - clean, and the timestep is 1000 s.

    Args:
        clean, noise: (batch, frames, height, width, channels).
        uniform: u in 0..1, (batch,).
        shift: Of the solver.
    """
    level = shifted(uniform, shift)
    s = _per_video(level, clean)
    return Example((1 - s) * clean + s * noise, TRAIN_TIMESTEPS * level, noise - clean)


def variance_preserving_example(
    clean: jax.Array, noise: jax.Array, uniform: jax.Array, alphas: np.ndarray, prediction_type: str
) -> Example:
    """sqrt(a) clean + sqrt(1 - a) noise at timesteps floor(1000 u), and what `prediction_type` calls for.

    An unweighted error of v is the error of the clean latents times 1 / (1 - a), with which diffusers trains
    CogVideoX.

    Args:
        clean, noise: (batch, frames, height, width, channels).
        uniform: u in 0..1, (batch,).
        alphas: a of every timestep, (1000,).
        prediction_type: See `qvdjax.diffusion.alphas.VariancePreserving`.
    """
    timestep = jnp.clip(jnp.floor(TRAIN_TIMESTEPS * uniform), 0, TRAIN_TIMESTEPS - 1)
    rows = timestep.astype(jnp.int32)
    # Roots of the table in float64: 1 - a of a rounded a would lose digits at the last timesteps.
    signal, rest = (
        _per_video(jnp.asarray(table, clean.dtype)[rows], clean) for table in (np.sqrt(alphas), np.sqrt(1 - alphas))
    )
    target = {"v_prediction": signal * noise - rest * clean, "epsilon": noise, "sample": clean}[prediction_type]
    return Example(signal * clean + rest * noise, timestep.astype(jnp.float32), target)


def _per_video(values: jax.Array, latents: jax.Array) -> jax.Array:
    return rearrange(values, "b -> b 1 1 1 1").astype(latents.dtype)
