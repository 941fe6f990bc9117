"""The job of `qvdjax web`: a page that shows two models' videos of one prompt and seed side by side.

What is asked for (`question.py`) and what is computed (`pair.py`, `answer.py`) are plain functions; `page.py` and
`server.py` alone know gradio, which is imported when the page is served.
"""

from experiments.web.server import serve

__all__ = ["serve"]
