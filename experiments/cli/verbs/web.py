"""The verb that serves a page: web."""

from experiments.cli import values
from experiments.cli.arguments import Web
from experiments.cli.outcome import Outcome
from experiments.cli.terminal import Progress


def web(arguments: Web, progress: Progress | None) -> Outcome:
    """Serve a page that shows two models' videos side by side, until it is interrupted."""
    from experiments.web import serve

    report = serve(
        arguments.reference,
        arguments.candidate,
        host=arguments.host,
        port=arguments.port,
        video=values.video(arguments.video),
        execution=arguments.execution,
    )
    return Outcome(report, [f"{report['url']} is closed"])
