"""What one training run is: batch, optimizer, learning rates by kind of parameter, precision."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import einops
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from experiments.training.objective import Corrupted, Objective
from qvdjax.errors import UserError
from qvdjax.nn.variables import leading_shape
from qvdjax.qat import ClipLogit, LearnedScale, LearnedZeroPoint


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one training run is, beside its length.

    Attributes:
        seed: Of the data's order, the noise and the noise levels.
        batch: Examples in a step, over all devices and micro-batches.
        accumulate: Micro-batches whose gradients are summed before the parameters move; divides `batch`.
        learning_rate, final_rate, warm_up: See `rate`.
        group_rates: Learning rates of kinds of parameters (classes of Variable), relative to `learning_rate`;
            the nearest class of a Variable's ancestry counts, 1 where none is named.
        weight_decay: Of matrices; vectors, and the parameters of quantizers, are not decayed.
        clip: Largest global norm of the gradient; larger ones are scaled down to it.
        average: Decay a step of the averaged weights; None keeps no average, which saves a copy of the model.
        optimizer: "adamw", or "muon" for the blocks' matrices and AdamW for the rest.
        dtype: What the student computes in; parameters, moments and gradients' sums are float32 always.
        remat: Recompute each block in the backward pass, instead of keeping what is inside it.
        tolerated: Steps in a row that may be left out because they were not finite.
        frames: Train on the first so many frames of each clip; None for all.
        objective: What is minimised.
    """

    seed: int = 0
    batch: int = 128
    accumulate: int = 1
    learning_rate: float = 1e-3
    final_rate: float = 1e-5
    warm_up: int = 500
    group_rates: Mapping[type, float] = dataclasses.field(default_factory=dict)
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float | None = 0.9995
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: bool = False
    tolerated: int = 3
    frames: int | None = None
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
        return optax.chain(
            clip,
            optax.scale_by_adam(b1=0.9, b2=0.99),
            optax.add_decayed_weights(self.weight_decay, mask=_decayed),
        )

    def rate(self, step: jax.Array, total: jax.Array) -> jax.Array:
        """Learning rate: linear warm-up, then half a cosine down to `final_rate` at the last step."""
        progress = jnp.clip((step - self.warm_up) / jnp.maximum(total - self.warm_up, 1), 0, 1)
        cosine = self.final_rate + (self.learning_rate - self.final_rate) * (1 + jnp.cos(jnp.pi * progress)) / 2
        return cosine * jnp.minimum(1, (step + 1) / max(self.warm_up, 1))

    def group_rate(self, kind: type) -> float:
        """How much faster than `learning_rate` Variables of this kind move."""
        return next((self.group_rates[base] for base in kind.__mro__ if base in self.group_rates), 1.0)

    def rates(self, step: jax.Array, total: jax.Array) -> dict[str, float]:
        """Learning rates by kind of parameter: of weights, and of the kinds that `group_rates` names."""
        rate = float(self.rate(step, total))
        return {"weights": rate, **{kind.__name__: factor * rate for kind, factor in self.group_rates.items()}}

    def noise_key(self, step: jax.Array) -> jax.Array:
        """Random key of a step's noise, noise levels and dropped captions."""
        return jax.random.fold_in(jax.random.key(self.seed ^ 0x5EED), step)  # apart from the data's keys

    def corrupted(self, data: dict[str, jax.Array], step: jax.Array) -> Corrupted:
        """What a step is trained on: the first frames of its batch, with the noise that follows from (seed, step)."""
        data = {**data, "latents": data["latents"][:, : self.frames]}
        return self.objective.corrupt(data, self.noise_key(step))

    def average_decay(self, step: jax.Array) -> jax.Array:
        """Early averages forget quickly, so that they do not hold the initial weights."""
        return jnp.minimum(self.average, (1 + step) / (10 + step))


def check_micro_batches(batch: int, accumulate: int) -> None:
    """Raise UserError where a batch cannot be cut into that many equal parts."""
    if accumulate < 1 or batch % accumulate:
        raise UserError(f"{accumulate} micro-batches do not divide a batch of {batch}", remedy="choose a divisor")


def micro_batches(batch: Any, count: int) -> Any:
    """Arrays (batch, ...) as (micro, batch / micro, ...).

    Neighbouring rows go to different micro-batches, so that each stays spread over all devices.
    """
    return jax.tree.map(lambda x: einops.rearrange(x, "(b micro) ... -> micro b ...", micro=count), batch)


def _decayed(params: nnx.State) -> nnx.State:
    """Which parameters are pulled towards zero: not those of quantizers, where zero means nothing."""
    quantizers = (LearnedScale, LearnedZeroPoint, ClipLogit)

    def of(variable: nnx.Variable) -> nnx.Variable:
        return variable.replace(variable.get_value().ndim > 1 and not isinstance(variable, quantizers))

    return jax.tree.map(of, params, is_leaf=lambda node: isinstance(node, nnx.Variable))


def _block_matrices(params: nnx.State) -> nnx.State:
    """For each parameter, how Muon reads it: weights (..., out, in, *kernel) of blocks are matrices (out, in * kernel),
    those of a stack one for each layer; the rest is not.

    By name, because what quantization adds (factors, scales) is never called `weight`. optax also hands over trees
    whose leaves it has masked; these stay as they are.
    """

    def of(path: tuple[Any, ...], variable: nnx.Variable) -> nnx.Variable:
        name, weight = jax.tree_util.keystr(path), variable.get_value()
        if isinstance(weight, optax.MaskedNode):
            return variable
        within, stacked = len(variable.get_metadata("axes")), len(leading_shape(variable))
        matrix = "'stacks'" in name and name.endswith("['weight']") and within > 1
        reduced = tuple(range(stacked + 1, weight.ndim))
        return variable.replace(optax.contrib.MuonDimensionNumbers(reduced, stacked) if matrix else None)

    return jax.tree_util.tree_map_with_path(of, params, is_leaf=lambda node: isinstance(node, nnx.Variable))
