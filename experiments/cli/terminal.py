"""Drawing by rich, imported only when there is something to draw: tables on stdout, bars on stderr."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from experiments.cli.outcome import Table

Progress = Callable[[str, int, int], None]


def show(lines: Sequence[str | Table]) -> None:
    """Print strings as they are and tables drawn, to stdout; away from a terminal as wide as they need."""
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    class Stdout(Console):
        def on_broken_pipe(self):
            raise BrokenPipeError  # rich would end the program here, with the code of a missed threshold

    console = Stdout(highlight=False)
    if not console.is_terminal:
        console.width = 10_000
    for line in lines:
        if isinstance(line, str):
            console.print(Text(line), soft_wrap=True)
            continue
        drawn = RichTable(title=line.title or None, title_justify="left", box=None, pad_edge=False)
        for name in line.columns:
            drawn.add_column(name, justify="right" if name in line.right else "left")
        for row in line.rows:
            drawn.add_row(*(Text(str(cell)) for cell in row))
        console.print(drawn)


@contextmanager
def progress_bar() -> Iterator[Progress | None]:
    """Yield `report(stage, done, total)`, which draws a bar a stage on stderr; None away from a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report
