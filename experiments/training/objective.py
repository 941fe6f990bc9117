"""What is minimised: the error of flow matching, alone or towards a teacher."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

Velocity = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Takes latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim)."""

Corrupted = dict[str, jax.Array]
"""latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim), and the
velocity that the data has, shaped like the latents."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and distributions of the loss.

    Attributes:
        shift: Noise levels are s = shift u / (1 + (shift - 1) u) with u uniform, as a sampler with this shift
            visits them.
        drop_caption: Part of the examples whose context is zeroed (the empty prompt), for guidance.
        data: Weight of the distance to the data's velocity.
        teacher: Weight of the distance to the teacher's velocity; only with a teacher.
    """

    shift: float = 3.0
    drop_caption: float = 0.1
    data: float = 1.0
    teacher: float = 0.0

    def __call__(
        self, model: Velocity, batch: dict[str, jax.Array], key: jax.Array, teacher: Velocity | None = None
    ) -> jax.Array:
        """The mean squared velocity error, float32 ()."""
        return self.loss(model, self.corrupt(batch, key), teacher)

    def corrupt(self, batch: dict[str, jax.Array], key: jax.Array) -> Corrupted:
        """Noisy latents of a batch {latents, context}, and what a model should make of them.

        x_s = (1 - s) x + s e with Gaussian e; the velocity is e - x and the timestep 1000 s (rectified flow,
        Liu et al. 2022, in Wan's units). Row i is the same whatever devices the batch is spread over.
        """
        latents, context = batch["latents"], batch["context"]
        level_key, noise_key, drop_key = jax.random.split(key, 3)
        level = self.levels(level_key, latents.shape[0])
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        kept = jax.random.bernoulli(drop_key, 1 - self.drop_caption, (latents.shape[0],))
        s = level[:, None, None, None, None]  # (batch, 1, 1, 1, 1)
        return {
            "latents": (1 - s) * latents + s * noise,
            "timestep": 1000 * level,
            "context": context * kept[:, None, None],
            "velocity": noise - latents,
        }

    def loss(self, model: Velocity, corrupted: Corrupted, teacher: Velocity | None = None) -> jax.Array:
        """The mean squared velocity error on corrupted examples, float32 ()."""
        inputs = (corrupted["latents"], corrupted["timestep"], corrupted["context"])
        velocity = model(*inputs)
        loss = self.data * _distance(velocity, corrupted["velocity"])
        if teacher is not None:
            loss += self.teacher * _distance(velocity, jax.lax.stop_gradient(teacher(*inputs)))
        return loss

    def levels(self, key: jax.Array, count: int) -> jax.Array:
        """Noise levels in (0, 1), (count,).

        Stratified: one in each of `count` equal parts of u, which steadies the loss and keeps its mean.
        """
        offset = jax.random.uniform(key, ())
        u = (jnp.arange(count, dtype=jnp.float32) + offset) / count
        return self.shift * u / (1 + (self.shift - 1) * u)


def _distance(prediction: jax.Array, target: jax.Array) -> jax.Array:
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)))
