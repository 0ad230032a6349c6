"""Ctrl-C while resident ranks answer."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cptool.engine.resident import Resident


@contextmanager
def stopping(resident: Resident) -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C stop what the ranks answer, and a second one the program; yields whether one came.

    The first one raises no exception: one in the midst of a message would leave the rest of it in
    the connection.
    """
    count = 0

    def interrupt(number: int, frame: object) -> None:
        nonlocal count
        count += 1
        if count > 1:
            raise KeyboardInterrupt
        resident.stop()

    resident.stop(False)
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
        resident.stop(False)
