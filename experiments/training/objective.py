"""What is minimised: the error of the prediction, towards the data's own target, a teacher's, or both."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from qvdjax.diffusion import FlowMatchEuler, Solver

Prediction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Takes latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim)."""

Corrupted = dict[str, jax.Array]
"""latents (batch, frames, height, width, channels), timestep (batch,), context (batch, tokens, dim), the target that
the data has, shaped like the latents, and `teacher`, shaped so too, where the teacher's prediction is known already."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """Weights and distributions of the loss.

    Attributes:
        solver: Its kind of diffusion says what the model sees and what it should predict, its schedule at which noise
            levels: those that a sampler visits (see `example` of each solver).
        drop_caption: Part of the examples whose context is zeroed (the empty prompt), for guidance.
        data: Weight of the distance to the data's target.
        teacher: Weight of the distance to the teacher's prediction; only with a teacher, or with what it predicted.
        fading: With a teacher: at noise level s = timestep / 1000 the teacher's weight is further multiplied by
            l = (e^(fading s) - 1) / (e^fading - 1) and the data's by 1 - l (DSAQuant, arXiv 2609.04031); None for
            the same weights at all levels.
        motion: Weight of what an error has beside its mean over the frames of a clip, where that mean has 1. It does
            not change which prediction is best, only what is learned first.
        frame_factor: Frames of the clip in one of the latents, in front of the other channels; `motion` asks for it.
        most: Of models that predict the clean latents: an error weighs 1 + snr, as one of v does, but at most this.
            None for the same weight at all levels.
    """

    solver: Solver = FlowMatchEuler(3.0)
    drop_caption: float = 0.1
    data: float = 1.0
    teacher: float = 0.0
    fading: float | None = None
    motion: float = 1.0
    frame_factor: int = 1
    most: float | None = None

    def __post_init__(self):
        if self.most is not None and getattr(self.solver, "prediction_type", None) != "sample":
            raise ValueError(
                f"errors are weighed by the noise where clean latents are predicted, not for {self.solver}"
            )

    def __call__(
        self, model: Prediction, batch: dict[str, jax.Array], key: jax.Array, teacher: Prediction | None = None
    ) -> jax.Array:
        """The mean squared error, float32 ()."""
        return self.loss(model, self.corrupt(batch, key), teacher)

    def corrupt(self, batch: dict[str, jax.Array], key: jax.Array) -> Corrupted:
        """Noisy latents of a batch {latents, context}, and what a model should make of them.

        Row i is the same whatever devices the batch is spread over. What a batch has beside (`teacher`) stays as it is.
        """
        latents, context = batch["latents"], batch["context"]
        level_key, noise_key, drop_key = jax.random.split(key, 3)
        uniform = stratified(level_key, latents.shape[0])
        noise = jax.random.normal(noise_key, latents.shape, latents.dtype)
        kept = jax.random.bernoulli(drop_key, 1 - self.drop_caption, (latents.shape[0],))
        example = self.solver.example(latents, noise, uniform)
        return {
            **batch,
            "latents": example.latents,
            "timestep": example.timestep,
            "context": context * kept[:, None, None],
            "target": example.target,
        }

    def loss(self, model: Prediction, corrupted: Corrupted, teacher: Prediction | None = None) -> jax.Array:
        """The mean squared error on corrupted examples, float32 (). A teacher is not asked for what is known."""
        inputs = (corrupted["latents"], corrupted["timestep"], corrupted["context"])
        prediction = model(*inputs)
        to_data = self._distances(prediction, corrupted["target"]) * self._weights(corrupted["timestep"])
        known = corrupted.get("teacher")
        if self.teacher == 0 or (teacher is None and known is None):
            return self.data * jnp.mean(to_data)
        to_teacher = self._distances(prediction, jax.lax.stop_gradient(teacher(*inputs) if known is None else known))
        share = self.teacher_share(corrupted["timestep"] / 1000)
        of_data, of_teacher = (1.0, 1.0) if share is None else (1 - share, share)
        return jnp.mean(self.data * of_data * to_data + self.teacher * of_teacher * to_teacher)

    def teacher_share(self, level: jax.Array) -> jax.Array | None:
        """l of `fading` at noise levels (batch,); None where it is the same at all levels."""
        if self.fading is None:
            return None
        return jnp.expm1(self.fading * level) / jnp.expm1(self.fading)

    def _weights(self, timestep: jax.Array) -> jax.Array:
        """Of the errors at whole timesteps, float32 (batch,)."""
        if self.most is None:
            return jnp.ones_like(timestep)
        weights = np.minimum(1 / (1 - self.solver.alphas_cumprod()), self.most)  # 1 + snr = 1 / (1 - a)
        return jnp.asarray(weights, jnp.float32)[timestep.astype(jnp.int32)]

    def _distances(self, prediction: jax.Array, target: jax.Array) -> jax.Array:
        """Mean squared distance of each example, float32 (batch,)."""
        error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
        squares = jnp.square(error)
        if self.motion != 1:
            frames = rearrange(error, "b f h w (t c) -> b (f t) h w c", t=self.frame_factor)
            common = jnp.mean(frames, axis=1, keepdims=True)  # b 1 h w c
            squares = jnp.square(common) + self.motion * jnp.square(frames - common)
        return jnp.mean(squares, axis=range(1, squares.ndim))


def stratified(key: jax.Array, count: int) -> jax.Array:
    """Numbers in (0, 1), one in each of `count` equal parts: steadies the loss and keeps its mean."""
    return (jnp.arange(count, dtype=jnp.float32) + jax.random.uniform(key, ())) / count
