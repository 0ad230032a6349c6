"""Progress bars, drawn while ranks work or a command counts its steps.

Time left follows from the share of the work that was done in the last two thirds of the time so
far (`Pace`), and not from the steps of the last seconds: a step, such as a layer of a long prompt,
may take minutes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cptool.cli.verbosity import draws_bars
from cptool.distributed.status_board import IDLE
from cptool.units import some, token_rate

if TYPE_CHECKING:
    from rich.progress import Progress

    from cptool.distributed.status_board import Board, Status
    from cptool.engine.answers.records import Emit, TokenLogprob

SOONEST = 0.02
"""The share from which on time left is shown: before, it would be a guess."""

_NARROWEST_BAR = 8
_PHASES = {"decode, token": "answering, token"}
"""Names of phases for users, where they differ from those in error messages."""


@contextmanager
def counting(what: str, total: int) -> Iterator["Callable[[], None]"]:
    """Draw a progress bar, if standard error is a terminal and -q was not given; yield what to call
    after each step.
    """
    done = 0
    with counted(f"{what},", total) as show:

        def advance() -> None:
            nonlocal done
            done += 1
            show(done)

        yield advance


@contextmanager
def following(phase: str, total: int) -> Iterator["Callable[[Board], None] | None"]:
    """Draw a progress bar over the steps of one phase, which several launches of ranks may share;
    yield what to call with their status board from time to time, as `progress` does.
    """
    with counted(phase, total) as show:

        def watch(board: "Board") -> None:
            status = board.read(0)
            if status.phase == phase:
                show(status.done)

        yield watch if draws_bars() else None


@contextmanager
def counted(what: str, total: int) -> Iterator["Callable[[int], None]"]:
    """Draw a progress bar as `counting` does; yield what to call with how many steps are done."""
    done, began = 0, time.monotonic()
    with drawn_bar(what) as bar:

        def draw() -> None:
            step = f"{what} {min(done + 1, total):,} of {total:,}"
            bar.draw(step, done / total, figures(done / total, time.monotonic() - began))

        def show(steps: int) -> None:
            nonlocal done
            done = steps
            draw()

        over = threading.Event()

        def tick() -> None:
            while not over.wait(0.5):
                draw()

        thread = threading.Thread(target=tick, name="cptool-bar", daemon=True)
        if not bar.hidden:
            draw()
            thread.start()
        try:
            yield show
        finally:
            over.set()
            if thread.is_alive():
                thread.join()


class Pace:
    """Estimates the time left of work from the shares that are done at moments.

    The rest goes on at the speed of the last two thirds of the time so far. What came before, such
    as a slow start or another program that has ended since, does not count any more.
    """

    def __init__(self, began: float) -> None:
        self._seen = deque([(began, 0.0)])
        self._began = began

    def left(self, now: float, share: float) -> float | None:
        """Return the seconds left once `share` is done; None while that is unknown.

        To be called at ascending moments.
        """
        seen = self._seen
        if share > seen[-1][1]:
            seen.append((now, share))
        while len(seen) > 2 and seen[1][0] <= self._began + (now - self._began) / 3:
            seen.popleft()
        then, done = seen[0]
        return (now - then) * (1 - share) / (share - done) if share > done else None


class Followed:
    """A phase of ranks, as their board is read from time to time.

    share: what is done of it. elapsed: its seconds so far. left: those to come, None while unknown.
    """

    def __init__(self) -> None:
        self.elapsed = self.share = 0.0
        self.left: float | None = None
        self._phase, self._began = "", time.monotonic()
        self._pace = Pace(self._began)

    def follow(self, status: "Status") -> None:
        """Take what a rank does now."""
        now = time.monotonic()
        began = self._began if status.phase == self._phase else now
        if status.work is not None:
            began = status.work.began
        if (status.phase, began) != (self._phase, self._began):
            self.share = self.share if status.phase == self._phase else 0.0
            self._phase, self._began, self._pace = status.phase, began, Pace(began)
        share = status.work.share if status.work else status.done / max(1, status.total)
        self.share, self.elapsed = max(self.share, share), now - began
        self.left = self._pace.left(now, self.share)


class Bar:
    """A progress bar; `hidden` if it is not drawn."""

    def __init__(self, drawn: "Progress | None", first: str) -> None:
        self._drawn, self.hidden = drawn, drawn is None
        self._followed = Followed()
        if drawn is not None:
            self._task = drawn.add_task(first, total=None, figures="")

    def watch(self, board: "Board") -> None:
        """Draw what the board says of rank 0; to be called from time to time.

        Rank 0 stands for all: they share each layer's work in balance and end it together, and
        under a launcher the other ranks' records are on other machines.
        """
        status, followed = board.read(0), self._followed
        if not status.phase or status.phase == IDLE:
            return
        followed.follow(status)
        tokens = status.work.tokens if status.work else 0
        if status.phase in _PHASES:
            tokens = status.total
        shown = figures(followed.share, followed.elapsed, tokens, left=followed.left)
        drawn = (followed.share, shown) if status.total else (None, "")
        self.draw(described(status), *drawn)

    def draw(self, what: str, share: float | None, shown: str) -> None:
        """Draw a line: what is done, how much of it is done (None: unknown), and figures."""
        bar = self._drawn
        if bar is None:
            return
        parts = shown.split(", ")
        while len(parts) > 1 and bar.console.width < (
            len(what) + len(", ".join(parts)) + _NARROWEST_BAR + 2
        ):
            parts.pop(1)
        bar.update(
            self._task,
            description=what,
            total=None if share is None else 1.0,
            completed=share or 0.0,
            figures=", ".join(parts),
        )

    def before(self, emit: "Emit") -> "Emit":
        """Return `emit` with the bar taken away before its first call."""

        def first(sequence: int, token: int, score: "TokenLogprob | None") -> None:
            self.end()
            emit(sequence, token, score)

        return first

    def end(self) -> None:
        """Take the bar away."""
        if self._drawn is not None:
            drawn, self._drawn = self._drawn, None
            drawn.stop()


def described(status: "Status") -> str:
    """Return what a rank is doing, as a user reads it: `reading 3,812 tokens, layer 7 of 30`."""
    phase, step = _PHASES.get(status.phase, status.phase), min(status.done + 1, status.total)
    work = status.work
    if work is not None:
        phase = f"reading {some(work.tokens, 'token')}, layer"
        if work.chunks > 1:
            read = f"reading {work.done:,} of {some(work.tokens, 'token')}"
            return f"{read}, chunk {work.chunk + 1:,} of {work.chunks:,}"
    return f"{phase} {step:,} of {status.total:,}" if status.total else phase


def figures(share: float, elapsed: float, tokens: int = 0, *, left: float | None = None) -> str:
    """Return percent, tokens per second so far, time elapsed and time left; `share` of `tokens`
    were computed in `elapsed` seconds.

    left: the seconds left, by default at the speed so far.
    """
    shown = [f"{int(100 * share)}%"]  # 100% is the end
    if tokens and share and elapsed:
        shown.append(token_rate(tokens * share / elapsed))
    shown.append(clock(elapsed))
    if SOONEST <= share < 1:
        left = elapsed * (1 - share) / share if left is None else left
        shown.append(f"{clock(left)} left")
    return ", ".join(shown)


def clock(seconds: float) -> str:
    """Return seconds as `0:07`, `12:30` or `1:02:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@contextmanager
def progress() -> Iterator["Callable[[Board], None] | None"]:
    """Draw a progress bar; yield what to call with the ranks' status board from time to time.

    Yields None unless standard error is a terminal, or if -q was given.
    """
    with drawn_bar() as bar:
        yield None if bar.hidden else bar.watch


@contextmanager
def drawn_bar(first: str = "start the ranks") -> Iterator[Bar]:
    """Draw a progress bar while the body runs, if standard error is a terminal and -q was not
    given.

    first: what it says before anything is known.
    """
    if not draws_bars():
        yield Bar(None, first)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
    )
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, transient=True, expand=True) as drawn:
        bar = Bar(drawn, first)
        try:
            yield bar
        finally:
            bar.end()
