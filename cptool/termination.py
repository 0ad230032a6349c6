"""SIGTERM and SIGHUP as exceptions, so that what a process has begun is put in order."""

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


def _end(number: int, frame) -> None:
    raise SystemExit(128 + number)
