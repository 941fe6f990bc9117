"""The least time a step can take on a slice: arithmetic from published peak rates, never a measurement."""

import dataclasses
from typing import Literal

from experiments.bench.ceilings import Work, training_work
from experiments.training.plans import following
from qvdjax.recipes import Recipe


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one chip, as published: matrix products a second (bfloat16, int8; two operations a multiply-add), and bytes
    a second from its memory."""

    float_operations: float
    int8_operations: float
    bytes: float


# Austin et al., "How to Scale Your Model" (jax-ml.github.io/scaling-book), table of TPU specifications.
PEAKS = {
    "TPU v5 lite": Peak(1.97e14, 3.94e14, 8.1e11),
    "TPU v5": Peak(4.59e14, 9.18e14, 2.8e12),
    "TPU v6 lite": Peak(9.20e14, 1.84e15, 1.6e12),
}


def bound(
    work: Work, device_kind: str, devices: int, argument_bytes: int | None, *,
    step: Literal["sample", "train", "reconstruct"], recipe: Recipe | None, teacher: Recipe | None = None,
    teacher_cache: bool = False,
) -> dict:  # fmt: skip
    """What the matrix products and the memory of a step take at least.

    Args:
        work: Of one forward pass of the whole batch.
        device_kind: As jax names it.
        devices: Of the slice.
        argument_bytes: A device's part of weights and state, which is read at least once; None where not known.
        step: "sample" is a forward pass; "train" and "reconstruct" are three, with one more of the teacher where a
            recipe trains towards one.
        recipe: Quantized products run at the int8 rate when sampling; training rounds and multiplies floats.
        teacher: Recipe of a training step's teacher, whose products may run at the int8 rate; None for floats.
        teacher_cache: Whether the teacher's predictions are known, so that its pass is not made.

    Returns:
        `model_flops` (of the slice), `bound_seconds`, `bound_by` ("matrix products" or "memory"); the last two None
        for chips whose peaks are not known.
    """
    asked = step == "train" and recipe is not None and following(recipe.training).teacher != 0 and not teacher_cache
    own, taught = (
        (work, Work()) if step == "sample" else (training_work(work, teacher=False), work if asked else Work())
    )
    flops = (own + taught).total
    if device_kind not in PEAKS:
        return {"model_flops": flops, "bound_seconds": None, "bound_by": None}
    peak = PEAKS[device_kind]
    products = (_seconds(own, peak, recipe if step == "sample" else None) + _seconds(taught, peak, teacher)) / devices
    memory = (argument_bytes or 0) / peak.bytes
    by = "matrix products" if products >= memory else "memory"
    return {"model_flops": flops, "bound_seconds": max(products, memory), "bound_by": by}


def _seconds(work: Work, peak: Peak, recipe: Recipe | None) -> float:
    """Of matrix products at the peak of one chip; with weights at the int8 rate where a recipe multiplies integers."""
    integer = recipe is not None and _multiplies_integers(recipe)
    weights = (work.linear + work.convolution) / (peak.int8_operations if integer else peak.float_operations)
    return weights + (work.qk + work.pv) / peak.float_operations


def _multiplies_integers(recipe: Recipe) -> bool:
    """Whether the recipe rounds weights and inputs of products."""
    schemes = (rule.scheme for rule in recipe.rules if "feed_forward_in" in (rule.roles or ()))
    return any(scheme.weight is not None and scheme.activation is not None for scheme in schemes)
