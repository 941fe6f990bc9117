"""What a recipe says about its training, as settings of the trainer. None is a recipe or a model without a plan."""

from experiments.training.objective import Objective
from qvdjax.qat import AdapterFactor, ClipLogit, LearnedScale, LearnedZeroPoint
from qvdjax.recipes import Training


def following(plan: Training | None, data_weight: float = 0.0) -> Objective:
    """What the loss follows.

    Args:
        plan: Without one, it follows the teacher.
        data_weight: Weight of the distance to the data's velocity where the teacher has weight 1.
    """
    if plan is None or plan.target == "teacher":
        return Objective(data=data_weight, teacher=1.0)
    if plan.target == "data":
        return Objective(data=1.0, teacher=0.0)
    return Objective(data=1.0, teacher=1.0, fading=plan.fading)


def averaged(plan: Training | None, decay: float) -> float | None:
    """The decay of averaged weights, or None where no average may be taken.

    While a low-rank module fades the weights take over its part, and an average would lag behind with half of it lost.
    """
    return None if plan is not None and plan.auxiliary is not None else decay


def group_rates(plan: Training | None) -> dict[type, float]:
    """Learning rates of kinds of parameters relative to the weights'."""
    if plan is None:
        return {}
    scales = dict.fromkeys((LearnedScale, LearnedZeroPoint), plan.scale_rate)
    return {ClipLogit: plan.clip_rate, AdapterFactor: plan.adapter_rate, **scales}
