"""How far a download is: a bar on a terminal, else a line for each step."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cptool.checkpoint.fetching import Watch, unwatched
from cptool.cli import draw, verbosity
from cptool.cli.progress import clock, drawn_bar
from cptool.distributed.environment import is_first_rank
from cptool.units import byte_rate, size

_SOONEST_S = 0.3
"""Seconds after which the rate is shown: before, it would be a guess."""


@contextmanager
def fetching(name: str) -> Iterator[Watch]:
    """Yield what to call with the steps and bytes of fetching the model `name`, once for all ranks
    of a launcher. Nothing is drawn before its first call, and nothing with -q.
    """
    if verbosity.quiet() or not is_first_rank():
        yield unwatched
    elif not verbosity.draws_bars():
        yield _lines(name)
    else:
        with ExitStack() as stack:
            yield _drawing(name, stack)


def _lines(name: str) -> Watch:
    said: set[str] = set()

    def watch(step: str, done: int = 0, total: int = 0) -> None:
        if step not in said:
            said.add(step)
            draw.say(f"{name}: {step}{f' ({size(total)})' if total else ''}")

    return watch


def _drawing(name: str, stack: ExitStack) -> Watch:
    """Return what draws a bar, which `stack` takes away."""
    bar, lock = None, threading.Lock()
    begun: tuple[float, int] | None = None  # when bytes were first counted, and how many were here

    def watch(step: str, done: int = 0, total: int = 0) -> None:
        nonlocal bar, begun
        with lock:
            if bar is None:
                bar = stack.enter_context(drawn_bar(name))
            if not (done or total):
                bar.draw(f"{name}: {step}", None, "")
                return
            now = time.monotonic()
            begun = begun or (now, done)
            share = done / total if total else None
            bar.draw(name, share, figures(done, total, done - begun[1], now - begun[0]))

    return watch


def figures(done: int, total: int, arrived: int, elapsed: float) -> str:
    """Return percent, bytes, bytes per second and time left of a download of `total` bytes, which
    are not known if 0.

    done: bytes that are here, `arrived` of them in the last `elapsed` seconds.
    """
    shown = [f"{100 * done // total}%", f"{size(done)} of {size(total)}"] if total else [size(done)]
    if arrived and elapsed >= _SOONEST_S:
        shown.append(byte_rate(arrived / elapsed))
        if total:
            shown.append(f"{clock((total - done) * elapsed / arrived)} left")
    return ", ".join(shown)
