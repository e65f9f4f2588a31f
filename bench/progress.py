"""What a person sees while something runs: a console of a fair width, a bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[float, float, str], None]
"""`report(done, total, text)`."""


def terminal(*, stderr: bool = True) -> Console:
    """A console; wide enough for tables where there is no terminal to ask."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=110)


@contextmanager
def bar(what: str) -> Iterator[Report]:
    """A progress bar on stderr."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} {task.fields[text]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=terminal()) as progress:
        task = progress.add_task(what, total=1, text="")
        yield lambda done, total, text: progress.update(task, completed=done, total=total, text=text)
