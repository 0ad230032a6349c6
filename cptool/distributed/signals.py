"""Signals as exceptions, so that a process can clean up, and an end within seconds if no exception
gets through.
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
from typing import NoReturn

from cptool.distributed.environment import launched

PATIENCE_S = 4.0
"""How long a command that was interrupted or terminated may take to end in order."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_reported: threading.Lock | None = None
"""Held by whoever reports how a guarded command ended."""


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """While the body runs, have SIGTERM and SIGHUP raise SystemExit with a shell's exit code.

    By default they end the process at once, and its temporary folders stay. Signals that are
    already handled or ignored keep their handlers. So do those of a rank of a launcher, which may
    be blocked in a transfer, where Python handles no signal, and which must end at once.
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
    """Defer the signals that Python handles while the body runs.

    Afterwards the first takes effect, in place of an exception of the body's. This is for imports
    of torch, which takes any exception during its import of NumPy to mean that NumPy is missing:
    a Ctrl-C would be lost.
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
    """Have the kernel kill this process when the thread that started it ends. Linux only."""
    import ctypes  # here, to keep a command's start quick

    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def guard(early: Callable) -> None:
    """Have Ctrl-C, SIGTERM or SIGHUP end a command's process within PATIENCE_S seconds, whatever it
    is doing. Call it once, in the main thread.

    SIGINT raises KeyboardInterrupt in place of `early`, the handler so far; further ones have no
    effect. Python runs handlers only between two operations of the main thread, and a layer of a
    long prompt is one operation that may take minutes. So a thread watches for signals too, and
    ends the process itself if the exception did not. A rank of a launcher keeps Python's own
    handler.
    """
    watched = signal.getsignal(signal.SIGINT) is early
    if watched:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if _has_seat():
        return
    global _reported
    _reported = threading.Lock()
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
    """A handler that raises KeyboardInterrupt for the first signal alone.

    Later signals must not interrupt the cleanup that the first one causes, whose time is limited
    anyway.
    """

    def __init__(self) -> None:
        self.came = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.came:
            self.came = True
            raise KeyboardInterrupt


class Stop(Interrupt):
    """A handler whose first signal requests an end in order, and whose second one raises
    KeyboardInterrupt, or SystemExit for SIGTERM.

    request: makes the request and returns whether it will be heard. If not, the first signal raises
        already.
    noticed: returns whether it was heard, so that the process may take its time.
    """

    def __init__(self, request: Callable[[], bool], noticed: Callable[[], bool]) -> None:
        super().__init__()
        self.noticed = noticed
        self._request, self._lock = request, threading.RLock()
        self._heard: bool | None = None
        self._handled = self._arrived = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _requested_by
        self._handled += 1
        _requested_by = _requested_by or number
        # Signals in quick succession are handled once.
        if max(self._handled, self._arrived) > 1 or not self._requested():
            if number != signal.SIGINT and not self.came:
                self.came = True
                _end(number, frame)
            super().__call__(number, frame)

    def arrived(self) -> bool:
        """Return whether a signal that has just arrived leaves the process its time.

        The first one makes the request here: the main thread may be inside a layer for minutes.
        """
        self._arrived += 1
        return self._arrived == 1 and self._requested()

    def _requested(self) -> bool:
        with self._lock:
            if self._heard is None:
                self._heard = self._request()
            return self._heard


@contextlib.contextmanager
def stopping(
    request: Callable[[], bool], noticed: Callable[[], bool], *, terminate: bool = False
) -> Iterator[None]:
    """While the body runs, have the first Ctrl-C of a guarded process call `request`; see `Stop`.

    If `noticed` does not return True within PATIENCE_S, the process ends as `guard` says.

    terminate: whether SIGTERM, where it would raise SystemExit, does so too.
    """
    global _requested_by
    _requested_by, stop = None, Stop(request, noticed)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    main = threading.current_thread() is threading.main_thread()
    taken = [signal.SIGINT] if main and type(before[signal.SIGINT]) is Interrupt else []
    if main and terminate and before[signal.SIGTERM] is _end:
        taken.append(signal.SIGTERM)
    try:
        for number in taken:
            signal.signal(number, stop)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])


_requested_by: int | None = None
"""The first signal of the last `stopping`."""


def end_as_requested(line: str) -> NoReturn:
    """End a command that a signal has stopped in order, with a line that says what was kept: raise
    KeyboardInterrupt, or for SIGTERM write the line and raise SystemExit with a shell's exit code.
    """
    if _requested_by == signal.SIGTERM:
        print(f"cptool: terminated {line}", file=sys.stderr, flush=True)
        _end(_requested_by, None)
    raise KeyboardInterrupt(f"interrupted {line}")


class Caught:
    """A handler that raises KeyboardInterrupt where the main thread waits for the user (`wait`).
    Other signals have no effect, so that none gets into the handling of the one before.
    """

    def __init__(self) -> None:
        self.waits, self._waiting = 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        global _caught_at
        _caught_at = time.monotonic()
        if self._waiting:
            self._waiting = False
            raise KeyboardInterrupt

    def wait(self, read: Callable[[], str]) -> str:
        """Return what `read` returns. Raises KeyboardInterrupt at the first signal before that."""
        self.waits += 1
        self._waiting = True
        try:
            return read()
        except SystemError:
            # A second signal, handled while the exception of the first was leaving readline, makes
            # the interpreter raise this in its place.
            if self._waiting:
                raise
            raise KeyboardInterrupt from None
        finally:
            self._waiting = False

    def nudge(self) -> None:
        """Repeat a signal that has just arrived if the wait goes on.

        readline handles no signal that comes after its last look and before it waits for a key.
        """
        waits, main = self.waits, threading.main_thread().ident
        time.sleep(0.05)
        if self._waiting and self.waits == waits and main is not None:
            signal.pthread_kill(main, signal.SIGINT)


@contextlib.contextmanager
def caught() -> Iterator[Caught]:
    """While the body runs, have Ctrl-C raise KeyboardInterrupt in `Caught.wait` alone, for a caller
    that catches it and goes on: a guarded process does not end then.
    """
    handler, before = Caught(), signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or type(before) is not Interrupt:
        yield handler
        return
    signal.signal(signal.SIGINT, handler)
    try:
        yield handler
    finally:
        signal.signal(signal.SIGINT, before)


_caught_at = 0.0
"""When a `Caught` last had a signal: the watching thread may see it only after the body's end."""


def _leave_unless_noticed(handler: Stop, number: int) -> None:
    time.sleep(PATIENCE_S)
    if not handler.noticed() and signal.getsignal(number) is handler:
        leave(number)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _watch(reading: int) -> None:
    while True:
        for number in os.read(reading, 64):
            # With another handler, such as that of `cptool chat` for Ctrl-C, the process goes on.
            handler = signal.getsignal(number) if number in _SIGNALS else None
            if isinstance(handler, Stop) and handler.arrived():
                arguments = (handler, number)
                threading.Thread(target=_leave_unless_noticed, args=arguments, daemon=True).start()
            elif isinstance(handler, Caught) and number == signal.SIGINT:
                handler.nudge()
            elif handler is _end or isinstance(handler, (Interrupt, _Held)):
                # An import leaves nothing to clean up, so it gets less time.
                came = time.monotonic()
                time.sleep(1.0 if isinstance(handler, _Held) else PATIENCE_S)
                if number != signal.SIGINT or _caught_at < came - 0.5:
                    leave(number)


def claim_report() -> bool:
    """Return True to the first caller, who reports how this command ended.

    The main thread and the one that watches for signals may both be about to.
    """
    return _reported is None or _reported.acquire(blocking=False)


def claim_or_wait() -> None:
    """Return once the caller may report how this command ended; if another thread is ending the
    process, wait for that.
    """
    if not claim_report():
        time.sleep(60)


def leave(number: int) -> None:
    """End this process as signal `number` requires, without unwinding; remove temporary folders."""
    from cptool.host.scratch import remove_folders

    if sys.stderr.isatty():
        os.write(2, b"\x1b[?25h\n")  # shows the cursor, which a progress bar hides
    if number == signal.SIGINT and claim_report():
        os.write(2, b"cptool: interrupted\n")
    try:
        remove_folders()
    finally:
        os._exit(128 + number)


def _unraisable(found: sys.UnraisableHookArgs) -> None:
    """Handle an exception where Python cannot raise it, such as in a destructor.

    A Ctrl-C ends the process; other exceptions show a traceback only with CPTOOL_TRACEBACK set.
    """
    if isinstance(found.exc_value, KeyboardInterrupt):
        leave(signal.SIGINT)
    if os.environ.get("CPTOOL_TRACEBACK"):
        sys.__unraisablehook__(found)
