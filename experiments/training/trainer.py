"""The training step: AdamW or Muon, warm-up and cosine, averaged weights, many steps in one call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from experiments.training.objective import Objective, Velocity

State = dict[str, Any]
"""params and average (nnx.State of Param), optimizer (optax state), step and total (int32 ())."""

Draw = Callable[[int, jax.Array, int], dict[str, jax.Array]]
"""draw(seed, step, size) -> the batch of a step, {latents, context}; works inside jit."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one training run is, beside its length."""

    seed: int = 0
    batch: int = 128
    learning_rate: float = 1e-3
    final_rate: float = 1e-5
    warm_up: int = 500
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.9995
    optimizer: Literal["adamw", "muon"] = "adamw"
    frames: int | None = None  # train on the first so many frames of each clip; None for all
    objective: Objective = Objective()

    @property
    def transformation(self) -> optax.GradientTransformation:
        """The optimizer without its learning rate, which depends on a total that may be set while training.

        Muon (Jordan 2024; optax.contrib) orthogonalises the momentum of the blocks' matrices, each layer's by
        itself, scaled so that an entry moves about as far as under AdamW (Liu et al. 2025, arXiv 2502.16982);
        everything else follows AdamW.
        """
        clip = optax.clip_by_global_norm(self.clip)
        if self.optimizer == "muon":
            muon = optax.contrib.muon(
                1.0, weight_decay=self.weight_decay, adam_b1=0.9, adam_b2=0.99, consistent_rms=0.2,
                muon_weight_dimension_numbers=_block_matrices,
            )  # fmt: skip
            return optax.chain(clip, muon, optax.scale(-1.0))  # it subtracts; so does the trainer
        matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
        return optax.chain(
            clip,
            optax.scale_by_adam(b1=0.9, b2=0.99),
            optax.add_decayed_weights(self.weight_decay, mask=matrices),
        )

    def rate(self, step: jax.Array, total: jax.Array) -> jax.Array:
        """Learning rate: linear warm-up, then half a cosine down to `final_rate` at the last step."""
        progress = jnp.clip((step - self.warm_up) / jnp.maximum(total - self.warm_up, 1), 0, 1)
        cosine = self.final_rate + (self.learning_rate - self.final_rate) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return cosine * jnp.minimum(1, (step + 1) / max(self.warm_up, 1))

    def average_decay(self, step: jax.Array) -> jax.Array:
        """Early averages forget quickly, so that they do not hold the initial weights."""
        return jnp.minimum(self.average, (1 + step) / (10 + step))


def _block_matrices(params: nnx.State) -> nnx.State:
    """For each parameter, how Muon reads it: (layers, out, in) of stacked blocks are matrices, the rest is not."""
    stacked = optax.contrib.MuonDimensionNumbers(reduction_axis=2, output_axis=1)

    def of(path: tuple[Any, ...], leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        return stacked if "stacks" in jax.tree_util.keystr(path) and leaf.ndim == 3 else None

    return jax.tree_util.tree_map_with_path(of, params)


class Trainer:
    """A model's structure with its settings; holds no arrays that training changes.

    Args:
        model: What is trained; its `nnx.Param`s move, everything else stays.
        settings: See `Settings`.
        teacher: Frozen, or None.
        student: Turns the model with the current parameters into what the loss evaluates (fake quantization
            belongs here); the model itself by default.
        draw: The data of `advance`, drawn inside the step; not needed where batches are given.
    """

    def __init__(
        self, model: nnx.Module, settings: Settings, *, teacher: nnx.Module | None = None,
        student: Callable[[nnx.Module], Velocity] = lambda model: model, draw: Draw | None = None,
    ):  # fmt: skip
        self.graph, self.initial, self.rest = nnx.split(model, nnx.Param, ...)
        self.settings, self.teacher, self.student, self.draw = settings, teacher, student, draw
        self.run = jax.jit(self._run, donate_argnums=0)
        self.run_on = jax.jit(self._run_on, donate_argnums=0)

    def start(self, total: int) -> State:
        """The state before the first of `total` steps."""
        optimizer = self.settings.transformation.init(self.initial)
        copy = functools.partial(jax.tree.map, jnp.copy)  # the state is donated to each step
        return {"params": copy(self.initial), "average": copy(self.initial), "optimizer": optimizer,
                "step": jnp.int32(0), "total": jnp.int32(total)}  # fmt: skip

    def model(self, state: State, *, averaged: bool = True) -> nnx.Module:
        """The model with the averaged weights, or the last ones."""
        return nnx.merge(self.graph, state["average" if averaged else "params"], self.rest)

    def _run(self, state: State, steps: jax.Array, rest, teacher) -> tuple[State, jax.Array]:
        # The bound is data, so runs of every length are the same compiled loop and continue bit for bit.
        def body(_, carry):
            state, total = carry
            data = self.draw(self.settings.seed, state["step"], self.settings.batch)
            state, loss = self._step(state, data, rest, teacher)
            return state, total + loss

        state, total = jax.lax.fori_loop(0, steps, body, (state, jnp.float32(0)))
        return state, total / steps

    def _run_on(self, state: State, data: dict[str, jax.Array], rest, teacher) -> tuple[State, jax.Array]:
        return self._step(state, data, rest, teacher)

    def advance(self, state: State, steps: int) -> tuple[State, jax.Array]:
        """`steps` steps on clips drawn by rule; returns the mean loss too. The given state is used up."""
        return self.run(state, jnp.int32(steps), self.rest, self.teacher)

    def advance_on(self, state: State, data: dict[str, jax.Array]) -> tuple[State, jax.Array]:
        """One step on a given batch; returns the loss too. The given state is used up."""
        return self.run_on(state, data, self.rest, self.teacher)

    def _step(self, state: State, data: dict[str, jax.Array], rest, teacher) -> tuple[State, jax.Array]:
        settings, step = self.settings, state["step"]
        data = {**data, "latents": data["latents"][:, : settings.frames]}
        key = jax.random.fold_in(jax.random.key(settings.seed ^ 0x5EED), step)  # apart from the data's keys

        def loss_of(params):
            student = self.student(nnx.merge(self.graph, params, rest))
            return settings.objective(student, data, key, teacher)

        loss, gradients = jax.value_and_grad(loss_of)(state["params"])
        updates, optimizer = settings.transformation.update(gradients, state["optimizer"], state["params"])
        rate, decay = settings.rate(step, state["total"]), settings.average_decay(step)
        params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state["average"], params)
        state = {**state, "params": params, "average": average, "optimizer": optimizer, "step": step + 1}
        return state, loss
