"""Progress bars, drawn while ranks work or a command counts its steps."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cptool.distributed.status_board import Board


@contextmanager
def counting(what: str, total: int) -> Iterator["Callable[[], None]"]:
    """Draw a progress bar, if standard error is a terminal; yield what to call after each step."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def progress(*, quiet: bool = False) -> Iterator["Callable[[Board], None] | None"]:
    """Draw a progress bar; yield what to call with the ranks' status board from time to time.

    Yields None unless standard error is a terminal.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("start the ranks", total=None)

        def watch(board: "Board") -> None:
            status = board.read(0)
            if status.phase and status.phase != bar.tasks[task].description:
                bar.reset(task, description=status.phase, total=status.total or None)
            bar.update(task, completed=status.done)

        yield watch
