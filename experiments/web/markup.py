"""The parts of the page that show an answer, as HTML."""

from collections.abc import Callable
from pathlib import Path

from experiments.cli.outcome import number
from experiments.evaluation.markup import Markup, element, join, table
from experiments.web.answer import Answer, Side
from experiments.web.pair import Pair
from qvdjax.errors import UserError

IN_STEP = "in-step"
"""Class of the players that in_step.js keeps together."""


def heading(pair: Pair) -> Markup:
    """What the page shows."""
    names = (element("strong", folder.resolve().name) for folder in (pair.reference, pair.candidate))
    said = join(Markup(" beside ".join(names)), ": one prompt, one seed, the same starting noise")
    return element("header", element("h1", "One video, two models"), element("p", said, class_="asked"))


def players(answer: Answer, address: Callable[[Path], str]) -> Markup:
    """Both videos side by side, each under its label.

    Args:
        answer: What is shown.
        address: Where a browser finds a file.
    """
    asked = answer.question
    said = f"{asked.prompt} - seed {asked.seed}, {asked.steps} steps, guidance {number(asked.guidance_scale)}"
    figures = (
        element(
            "figure",
            element("figcaption", element("strong", label(side)), " ", side.folder),
            element(
                "video", class_=IN_STEP, src=address(side.video), controls=True, loop=True, muted=True,
                playsinline=True, preload="auto", aria_label=label(side),
            ),
        )
        for side in (answer.reference, answer.candidate)
    )  # fmt: skip
    return element("div", element("p", said, class_="asked"), element("div", *figures, class_="players"))


def label(side: Side) -> str:
    """How a model is called above its video: by its recipe, or "full precision"."""
    return side.recipe or "full precision"


def rows(answer: Answer) -> list[list[str]]:
    """The table below the videos: a measure, the reference's value, the candidate's.

    What is measured between the two stands in the candidate's column.
    """
    first, second = answer.reference, answer.candidate
    return [
        ["PSNR, dB", "", number(answer.psnr)],
        ["SSIM", "", number(answer.ssim)],
        ["relative squared error", "", number(answer.relative_error)],
        ["seconds to sample", number(first.seconds), number(second.seconds)],
        ["seconds to compile", number(first.compile_seconds), number(second.compile_seconds)],
        ["weight bytes", number(first.weight_bytes), number(second.weight_bytes)],
    ]


def metrics(answer: Answer) -> Markup:
    """`rows` as a table."""
    header = ["", label(answer.reference), label(answer.candidate)]
    caption = "Errors are those of the right video to the left one, before compression to mp4."
    return table(header, rows(answer), caption=caption, class_="metrics")


def problem(error: UserError) -> Markup:
    """What was wrong and what to do, in the place of an answer."""
    return element("div", str(error), class_="problem", role="alert")
