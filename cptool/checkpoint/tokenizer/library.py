"""Calls into the `tokenizers` library that end as one error, whatever happens in it.

The library is compiled Rust. It raises bare Exception, and if it panics, a PanicException, which
derives from BaseException, after it has written a message of its own to standard error. Its rules
for a text come from a file: a rule of one line can take any time, or turn 1 KB into 100 MB.
"""

import os
import resource
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cptool.checkpoint.fields import first_line
from cptool.errors import UserError

# The library's threads serve batches of texts; with them, it warns on standard error at every fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# Bounds for a text of `size` characters. Ordinary tokenizers take about a microsecond and a hundred
# bytes for each.
_CPU_S, _CPU_S_PER_CHARACTER = 20.0, 20e-6
_MEMORY, _MEMORY_PER_CHARACTER = 2 << 30, 1 << 10
_POLL_S = 0.05


class LibraryError(Exception):
    """The library's message, in one line."""


def call(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """Return what `function` of the library returns; LibraryError if it raises or panics."""
    try:
        return function(*arguments, **settings)
    except Exception as error:
        raise LibraryError(first_line(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Ctrl-C, say
            raise
        raise LibraryError(f"the tokenizers library fails: {first_line(error)}") from None


class LimitError(UserError):
    """A text took more time or memory than any text needs.

    The library cannot be interrupted: it goes on in a thread until the process ends.
    """


class Limit:
    """What the library may take for one text of `size` characters, in one call or several."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._seconds = _CPU_S + _CPU_S_PER_CHARACTER * size
        self._bytes = _resident() + _MEMORY + _MEMORY_PER_CHARACTER * size

    def call(self, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Like `call`, but raise LimitError beyond the limit.

        `function` must release the interpreter.
        """
        done, clock, result = threading.Event(), [], []

        def work() -> None:
            clock.append(time.pthread_getcpuclockid(threading.get_ident()))
            try:
                result.append(function(*arguments, **settings))
            except BaseException as error:
                result.append(error)
            self._seconds -= time.thread_time()
            done.set()

        threading.Thread(target=work, name="cptool-tokenizer", daemon=True).start()
        while not done.wait(_POLL_S):
            self._check(clock)
        if isinstance(result[0], BaseException):
            return call(_raise, result[0])
        return result[0]

    def _check(self, clock: list[int]) -> None:
        try:
            seconds = time.clock_gettime(clock[0]) if clock else 0.0
        except OSError:  # The thread has just ended.
            return
        if seconds > self._seconds:
            what = f"{_CPU_S + _CPU_S_PER_CHARACTER * self._size:.0f} s"
        elif _resident() > self._bytes:
            what = f"{(_MEMORY + _MEMORY_PER_CHARACTER * self._size) >> 20:,} MB"
        else:
            return
        raise LimitError(
            f"the model's tokenizer takes more than {what} for a text of {self._size:,} "
            f"characters; give token ids"
        )


def _raise(error: BaseException) -> None:
    raise error


def _resident() -> int:
    """Return the bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


_muting = threading.RLock()


@contextmanager
def muted() -> Iterator[None]:
    """Discard what compiled code writes to standard error, such as the message of a panic."""
    with _muting:
        try:
            kept = os.dup(2)
        except OSError:  # closed: nothing is written anyway
            yield
            return
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 2)
            os.close(nowhere)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
