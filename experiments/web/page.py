"""The page's layout: fields, a button, and places for the players and the table."""

import importlib.resources
import tempfile
from pathlib import Path
from typing import Any

from experiments.web import markup
from experiments.web.answer import answer
from experiments.web.pair import Pair
from experiments.web.question import read_question
from qvdjax.errors import UserError

TITLE = "qvdjax: two models, one prompt"


def build_page(pair: Pair, folder: Path, *, execution: str | None = None) -> Any:
    """The page, a `gradio.Blocks` that is not served yet.

    Args:
        pair: The models.
        folder: Existing folder for videos; a browser must be allowed to read it, see `serve`.
        execution: Of quantized layers, see `sample_folder`.
    """
    import gradio

    def respond(prompt, seed, steps, guidance, bar=gradio.Progress()):
        def progress(stage: str, done: int, total: int) -> None:
            bar((done, total), desc=stage)

        try:
            question = read_question(prompt, seed, steps, guidance)
            # A new name for every answer: a browser would show the old video under an old one.
            videos = Path(tempfile.mkdtemp(dir=folder))
            found = answer(pair, question, videos, execution=execution, progress=progress)
        except UserError as error:
            return markup.problem(error), ""
        return markup.players(found, address), markup.metrics(found)

    with gradio.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        gradio.HTML(markup.heading(pair))
        if pair.presets:
            presets = gradio.Dropdown(list(pair.presets), value=None, label="Preset", elem_id="preset")
        prompt = gradio.Textbox(label="Prompt", elem_id="prompt", lines=2)
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", precision=None, elem_id="seed")
            steps = gradio.Number(pair.steps, label="Steps", precision=None, elem_id="steps")
            guidance = gradio.Number(pair.guidance_scale, label="Guidance scale", elem_id="guidance")
        button = gradio.Button("Sample both", variant="primary", elem_id="sample")
        videos = gradio.HTML(elem_id="videos", min_height=80)
        metrics = gradio.HTML(elem_id="metrics")
        if pair.presets:
            # In the browser: by way of the server, a quick press of the button would still find the old prompt.
            presets.input(None, presets, prompt, js="text => text ?? ''")
        gradio.on(
            [button.click, prompt.submit],
            respond,
            [prompt, seed, steps, guidance],
            [videos, metrics],
            show_progress_on=videos,
            concurrency_limit=1,
        )
    return page


def address(file: Path) -> str:
    """Where a browser finds a file that gradio is allowed to serve, relative to the page."""
    return f"gradio_api/file={file.as_posix()}"


def resource(name: str) -> str:
    """The text of a file beside this module."""
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
