"""What a recipe makes of a model while it is trained, and what is left of that at the end."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from experiments.training.objective import Prediction
from qvdjax import qat, recipes
from qvdjax.errors import UserError
from qvdjax.nn import AttentionScheme, LayerScheme, VideoModel
from qvdjax.qat.phases import begin_step
from qvdjax.qat.rank_decay import RankDecay
from qvdjax.quantization import quantize
from qvdjax.recipes import Recipe


class Student:
    """A model that is trained as it is; the others say what differs.

    `prepare` comes once, before training; `begin_step` and `at` in every step, inside jit; `finish` once, after it.
    `trained` are the kinds of Variables of the prepared model that training moves.
    """

    trained: tuple[type[nnx.Variable], ...] = (nnx.Param,)

    def prepare(self, model: VideoModel) -> VideoModel:
        """The model whose Variables of the kinds in `trained` are trained."""
        return model

    def begin_step(self, params: nnx.State, optimizer: Any, average: Any, step: jax.Array) -> tuple[Any, Any, Any]:
        """What changes in parameters, optimizer's state and average before a step's gradient is taken."""
        return params, optimizer, average

    def at(self, model: nnx.Module, step: jax.Array) -> Prediction:
        """What the loss evaluates at a step."""
        return model

    def watched(self, params: nnx.State, step: jax.Array) -> dict[str, jax.Array]:
        """What a report says beside the loss, numbers by name: state of the parameters before a step."""
        return {}

    def finish(self, model: VideoModel) -> VideoModel:
        """The trained model as it is stored."""
        return model

    def check_storable(self) -> None:
        """Raise UserError where `finish` would."""


@dataclasses.dataclass(frozen=True)
class StraightThrough(Student):
    """Weights and inputs rounded to the ranges they have in that step."""

    recipe: Recipe
    schemes: Mapping[str, LayerScheme | AttentionScheme]

    def at(self, model: VideoModel, step: jax.Array) -> Prediction:
        """The rounded model."""
        return qat.fake_quantized(model, self.schemes)

    def finish(self, model: VideoModel) -> VideoModel:
        """Quantized by the recipe."""
        return quantize(model, self.recipe)


@dataclasses.dataclass(frozen=True)
class Learned(Student):
    """Learned quantizers, with a low-rank module that decays where the recipe has one."""

    recipe: Recipe
    schemes: Mapping[str, LayerScheme | AttentionScheme]
    decay: RankDecay | None

    @property
    def trained(self) -> tuple[type[nnx.Variable], ...]:
        """Everything, or quantizers and adapters alone."""
        quantizers = (qat.AdapterFactor, qat.LearnedScale, qat.LearnedZeroPoint, qat.ClipLogit)
        return quantizers if self.recipe.training.adapter_rank else (nnx.Param,)

    def prepare(self, model: VideoModel) -> VideoModel:
        """Learned layers in the place of linear ones."""
        plan = self.recipe.training
        model = qat.learned(model, self.schemes, start=plan.start, scaled_gradients=plan.scaled_gradients)
        if plan.adapter_rank:
            model = qat.with_adapters(model, plan.adapter_rank)
        if plan.auxiliary is None:
            return model
        return qat.with_low_rank(model, plan.auxiliary.rank, start=plan.auxiliary.start)

    def begin_step(self, params: nnx.State, optimizer: Any, average: Any, step: jax.Array) -> tuple[Any, Any, Any]:
        """Where a phase of the decay starts, the modules are cut and made orthogonal."""
        if self.decay is None:
            return params, optimizer, average
        kept = (average,) if isinstance(average, nnx.State) else ()
        moments = self.recipe.training.auxiliary.second_moments
        params, optimizer, kept = begin_step(params, optimizer, step, self.decay, averages=kept, second_moments=moments)
        return params, optimizer, kept[0] if kept else average

    def at(self, model: VideoModel, step: jax.Array) -> Prediction:
        """The model with this step's gates."""
        return model if self.decay is None else qat.with_gamma(model, self.decay.gamma(step))

    def watched(self, params: nnx.State, step: jax.Array) -> dict[str, jax.Array]:
        """Of Phi: how many directions are alive, and which part of those singular values is small."""
        if self.decay is None:
            return {}
        rank = self.decay.active_rank(step)
        return {"rank": rank, "small_share": qat.small_share_of_phi(params, rank)}

    def finish(self, model: VideoModel) -> VideoModel:
        """The learned codes.

        Raises:
            UserError: The recipe keeps its low-rank modules.
        """
        self.check_storable()
        if self.decay is not None:
            model = qat.without_auxiliary(model)
        return qat.deploy(model, recipe_name=self.recipe.name)

    def check_storable(self) -> None:
        """Refuse what no quantized folder can hold."""
        if self.decay is not None and self.decay.phases == "keep":
            raise UserError(
                f"{self.recipe.name} with phases=keep keeps its float modules, which no quantized folder holds",
                remedy="compare it in training, or choose phases=paper, code or single",
            )


def student_of(model: VideoModel, recipe: Recipe | None, steps: int) -> Student:
    """How a model is trained under a recipe.

    Args:
        model: Float; may be abstract.
        recipe: None trains the float model.
        steps: Training steps in all, which phases divide.

    Raises:
        UserError: Phases that do not fit the steps; a path of the recipe that matches nothing; a recipe whose rounding
            needs calibration.
    """
    if recipe is None:
        return Student()
    if recipe.rounding is not None:
        raise UserError(
            f"{recipe.name} rounds weights with regard to calibrated inputs, which training does not",
            remedy="train with a recipe such as rtn-w4a4, or quantize the model by it instead",
        )
    schemes = recipes.decide(model, recipe).schemes
    if recipe.training is None:
        return StraightThrough(recipe, schemes)
    decay, auxiliary = None, recipe.training.auxiliary
    if auxiliary is not None:
        decay = RankDecay(steps, auxiliary.rank, auxiliary.keep, auxiliary.phases, auxiliary.shape, auxiliary.warm_up)
    return Learned(recipe, schemes, decay)
