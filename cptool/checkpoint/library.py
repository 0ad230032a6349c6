"""Calls into the `tokenizers` library that end as one error, whatever happens in it.

The library is compiled Rust. It raises bare Exception, and where it panics, a PanicException, which
derives from BaseException, after it has written a message of its own to standard error.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from cptool.checkpoint.base import first_line


class LibraryError(Exception):
    """What the library said, in one line."""


def call(function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What `function`, of the library, returns; LibraryError where it raises or panics."""
    try:
        return function(*arguments, **settings)
    except Exception as error:
        raise LibraryError(first_line(error)) from None
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Ctrl-C, say
            raise
        raise LibraryError(f"the tokenizers library fails: {first_line(error)}") from None


_muting = threading.RLock()


@contextmanager
def muted() -> Iterator[None]:
    """Discards what compiled code writes to standard error, such as the message of a panic."""
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
