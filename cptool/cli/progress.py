"""Progress bars, drawn while ranks work or a command counts its steps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cptool.cli.verbosity import draws_bars

if TYPE_CHECKING:
    from rich.progress import Progress

    from cptool.distributed.status_board import Board


@contextmanager
def counting(what: str, total: int) -> Iterator["Callable[[], None]"]:
    """Draw a progress bar, if standard error is a terminal and -q was not given; yield what to call
    after each step.
    """
    if not draws_bars():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


class Bar:
    """A progress bar of the ranks; `hidden` if it is not drawn."""

    def __init__(self, drawn: "Progress | None") -> None:
        self._drawn, self.hidden = drawn, drawn is None
        if drawn is not None:
            self._task = drawn.add_task("start the ranks", total=None)

    def watch(self, board: "Board") -> None:
        """Draw what the ranks' status board says; to be called from time to time."""
        bar, status = self._drawn, board.read(0)
        if bar is None:
            return
        if status.phase and status.phase != bar.tasks[self._task].description:
            bar.reset(self._task, description=status.phase, total=status.total or None)
        bar.update(self._task, completed=status.done)

    def before(self, emit: Callable[[int, int], None]) -> Callable[[int, int], None]:
        """Return `emit` with the bar taken away before its first call."""

        def first(sequence: int, token_id: int) -> None:
            self.end()
            emit(sequence, token_id)

        return first

    def end(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            self._drawn.stop()
            self._drawn = None


@contextmanager
def progress() -> Iterator["Callable[[Board], None] | None"]:
    """Draw a progress bar; yield what to call with the ranks' status board from time to time.

    Yields None unless standard error is a terminal, or if -q was given.
    """
    with drawn_bar() as bar:
        yield None if bar.hidden else bar.watch


@contextmanager
def drawn_bar() -> Iterator[Bar]:
    """Draw a progress bar while the body runs, if standard error is a terminal and -q was not
    given.
    """
    if not draws_bars():
        yield Bar(None)
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
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        bar = Bar(drawn)
        try:
            yield bar
        finally:
            bar.end()
