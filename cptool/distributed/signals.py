"""Signals as exceptions, where what a process has begun can be put in order, and an end within
seconds where no exception comes through.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from cptool.distributed.environment import launched

PATIENCE_S = 4.0
"""How long a command that was interrupted or terminated may take to end in order."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """While the body runs, SIGTERM and SIGHUP raise SystemExit, with the code by which a shell
    tells of them, instead of ending the process on the spot: temporary folders would stay.

    Nothing changes where somebody handles or ignores them already, nor for a rank of a launcher: it
    may be blocked in a transfer, where Python handles no signal, and its launcher wants it gone.
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


class _Held:
    """The handler of `held_back`: records the numbers of the signals that arrive."""

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.numbers.append(number)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """While the body runs, signals that Python handles wait; the first takes effect after it,
    in place of an exception of the body's.

    For imports of torch, which takes whatever is raised while it imports NumPy for a sign that
    there is none: a Ctrl-C would be forgotten.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held = _Held()
    handled = {n: signal.getsignal(n) for n in _SIGNALS if callable(signal.getsignal(n))}
    try:
        for number in handled:
            signal.signal(number, held)
        yield
    finally:
        for handled_number, handler in handled.items():
            signal.signal(handled_number, handler)
        for arrived in held.numbers[:1]:  # even after an exception, which it may have caused
            signal.raise_signal(arrived)


def end_with_parent() -> None:
    """Have the kernel kill this process when the thread that started it ends; Linux alone can."""
    import ctypes  # not among the first imports of a command

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def guard(early: Callable) -> None:
    """For the process of a command: end it by Ctrl-C, SIGTERM or SIGHUP within PATIENCE_S seconds,
    whatever it is doing. To be called once, in the main thread.

    SIGINT raises KeyboardInterrupt in place of `early`, the handler until now; a second one changes
    nothing. Python runs handlers between two operations of the main thread only, and a layer of a
    long prompt is one operation that may take minutes. So a thread watches for signals too, and
    ends the process itself if the exception did not. A rank of a launcher keeps Python's own
    handler.
    """
    watched = signal.getsignal(signal.SIGINT) is early
    if watched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _has_seat():
        return
    if watched:
        signal.signal(signal.SIGINT, Interrupt())
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(reading,), name="cptool-signals", daemon=True).start()
    sys.unraisablehook = _unraisable


def _has_seat() -> bool:
    return ("RANK" in os.environ and "WORLD_SIZE" in os.environ) or "SLURM_PROCID" in os.environ


class Interrupt:
    """The first raises KeyboardInterrupt; those after it must not break into what the first one
    makes put in order, for which time is limited anyway.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.came:
            self.came = True
            raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _watch(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            # Where somebody else handles it, as `cptool chat` does a Ctrl-C, it is not the end.
            handler = signal.getsignal(number) if number in _SIGNALS else None
            if handler is _end or isinstance(handler, (Interrupt, _Held)):
                # An import has begun nothing that would have to be put in order.
                time.sleep(1.0 if isinstance(handler, _Held) else PATIENCE_S)
                leave(number)


def leave(number: int) -> None:
    """End this process as signal `number` asks for, without unwinding; temporary folders go."""
    from cptool.host.scratch import remove_folders

    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # the cursor, which a progress bar hides
    if number == signal.SIGINT:
        os.write(2, b"cptool: interrupted\n")
    try:
        remove_folders()
    finally:
        os._exit(128 + number)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Handle what is raised where Python cannot raise, as in a destructor.

    A Ctrl-C is not lost, and nothing else shows a traceback.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        leave(signal.SIGINT)
    if os.environ.get("CPTOOL_TRACEBACK"):
        sys.__unraisablehook__(found)
