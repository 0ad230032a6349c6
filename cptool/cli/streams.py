"""Standard streams that are closed, full, abandoned by their reader, or of a narrow encoding.

This is among the first code that the command runs, so it imports little.
"""

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

OUTPUT = "standard output"
"""The file name of an OSError from standard output."""


class _Narrow(io.TextIOWrapper):
    """A stream that keeps to its encoding where that is ASCII: Click takes a stream of this name
    for a misconfigured one, and would write UTF-8 to it.
    """

    @property
    def encoding(self) -> str:  # type: ignore[override]
        name = super().encoding
        return "ascii only" if codecs.lookup(name).name == "ascii" else name


class _Output(_Narrow):
    """Standard output, whose errors have a file name."""

    def write(self, text: str) -> int:
        with _named():
            return super().write(text)

    def flush(self) -> None:
        with _named():
            super().flush()


@contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = OUTPUT
        raise


class _Forgiving(_Narrow):
    """Standard error, whose own errors are ignored: there is nowhere to report them."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except (OSError, ValueError):
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except (OSError, ValueError):
            pass


def prepare() -> None:
    """Make all three streams usable, whatever the command was started with.

    A closed one becomes /dev/null. Otherwise the next file to be opened, such as a session's, would
    get its number, and output would be written into that file.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = _Output(
        open(1, "wb", closefd=False),
        encoding=sys.stdout.encoding if sys.stdout else "utf-8",
        line_buffering=os.isatty(1),
    )
    sys.stderr = _Forgiving(
        open(2, "wb", closefd=False),
        encoding=sys.stderr.encoding if sys.stderr else "utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    replace_what_cannot_be_encoded()


def replace_what_cannot_be_encoded() -> None:
    """Let standard output show `?` for a character that its encoding lacks, instead of raising."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def finish() -> OSError | None:
    """Flush standard output, and return the error if that fails; output is then discarded.

    A reader that has closed it is not an error.
    """
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        discard()
        return None if isinstance(error, BrokenPipeError) else error
    return None


def discard() -> None:
    """Discard all further standard output, and what is still buffered."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
