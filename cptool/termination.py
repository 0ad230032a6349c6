"""Signals as exceptions, where what a process has begun can be put in order."""

import contextlib
import signal
import threading
from collections.abc import Iterator

from cptool.launcher import launched


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """While the body runs, SIGTERM and SIGHUP raise SystemExit, with the code by which a shell
    tells of them, instead of ending the process on the spot: temporary folders would stay.

    Nothing changes where somebody handles or ignores them already, nor for a rank of a launcher: it
    may be blocked in a transfer, where Python hears no signal, and its launcher wants it gone.
    """
    if threading.current_thread() is not threading.main_thread() or launched() is not None:
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGHUP)
    ours = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in ours:
            signal.signal(number, _end)
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While the body runs, signals that Python handles wait; the first takes effect after it.

    For imports of torch, which takes whatever is raised while it imports NumPy for a sign that
    there is none: a Ctrl-C would be forgotten.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    handled = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in handled:
            signal.signal(number, lambda number, frame: heard.append(number))
        yield
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    for number in heard[:1]:
        signal.raise_signal(number)


def _end(number: int, frame) -> None:
    raise SystemExit(128 + number)
