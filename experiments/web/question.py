"""What is typed into the page, and what of it is refused."""

import dataclasses
import math

from experiments.cli.values import LARGEST_SEED
from qvdjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Question:
    """What both models are asked for.

    Attributes:
        prompt: One sentence.
        seed: Of the starting noise, the same for both.
        steps: Sampler steps.
        guidance_scale: Strength of classifier-free guidance; 1 turns it off.
    """

    prompt: str
    seed: int
    steps: int
    guidance_scale: float


def read_question(prompt: str | None, seed: float | None, steps: float | None, guidance: float | None) -> Question:
    """A question from the page's fields; a field that was emptied is None, and whole numbers may come as floats.

    Raises:
        UserError: No prompt; a seed or a number of steps that is not whole or out of range; a guidance scale that is no
            finite number.
    """
    prompt = (prompt or "").strip()
    if not prompt:
        raise UserError("the prompt is empty", remedy="write a sentence, or choose a preset")
    if guidance is None or not math.isfinite(guidance):
        raise UserError(f"the guidance scale is {_said(guidance)}", remedy="give a finite number; 1 turns it off")
    return Question(
        prompt=prompt,
        seed=_whole("the seed", seed, 0, LARGEST_SEED),
        steps=_whole("the number of steps", steps, 1, None),
        guidance_scale=float(guidance),
    )


def _whole(name: str, value: float | None, low: int, high: int | None) -> int:
    whole = value is not None and math.isfinite(value) and value == int(value)
    if not whole or value < low or (high is not None and value > high):
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UserError(f"{name} is {_said(value)}", remedy=f"give a whole number {limits}")
    return int(value)


def _said(value: float | None) -> str:
    return "empty" if value is None else f"{value:g}"
