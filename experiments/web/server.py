"""Serving the page until it is interrupted."""

import signal
import tempfile
import threading
from pathlib import Path
from typing import Any

from experiments.web.pair import open_pair
from qvdjax.errors import UserError


def serve(
    reference: Path,
    candidate: Path,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    video: tuple[int, int, int] | None = None,
    execution: str | None = None,
) -> dict[str, Any]:
    """Serve the page; prints its address, and returns when the process is interrupted or told to stop.

    The videos lie in a temporary folder, which is removed at the end. Nothing is sent to anybody but the browser.

    Args:
        reference, candidate, video: See `open_pair`.
        host: Address to listen at; 0.0.0.0 lets other machines in.
        port: 1 to 65535.
        execution: Of quantized layers, see `sample_folder`.

    Returns:
        url, reference and candidate.

    Raises:
        UserError: gradio is not installed; folders that `open_pair` refuses; a port that cannot be used.
    """
    try:
        import gradio
    except ImportError:
        raise UserError(
            "the page is made by the package gradio, which is not installed", remedy="pip install 'qvdjax[web]'"
        ) from None
    from experiments.web.page import build_page, resource

    if not 1 <= port <= 65535:
        raise UserError(f"--port {port} is no port", remedy="name one from 1 to 65535")
    pair = open_pair(reference, candidate, video=video)
    with tempfile.TemporaryDirectory(prefix="qvdjax-web-") as folder:
        page = build_page(pair, Path(folder), execution=execution)
        try:
            # `head` and `css` are read once; fonts are the system's, so that the page needs no other server.
            _, url, _ = page.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, ssr_mode=False,
                inbrowser=False, allowed_paths=[folder], footer_links=[], css=resource("page.css"),
                head=f"<script>{resource('in_step.js')}</script>",
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )  # fmt: skip
        except OSError:
            raise UserError(
                f"port {port} of {host} cannot be listened at", remedy="choose another with --port, or another --host"
            ) from None
        print(f"{url} shows {pair.reference} beside {pair.candidate}; Ctrl-C ends it", flush=True)
        try:
            _wait()
        finally:
            page.server.force_exit = True  # a browser that holds a video open would be waited for
            page.close(verbose=False)
    return {"url": url, "reference": str(reference), "candidate": str(candidate)}


def _wait() -> None:
    """Return at Ctrl-C or SIGTERM: both are how a server ends, and the temporary folder must go."""
    stopped = threading.Event()
    former = {name: signal.signal(name, lambda *_: stopped.set()) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        stopped.wait()
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)
