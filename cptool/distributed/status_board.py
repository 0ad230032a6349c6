"""What each rank is doing, readable by another process even after the rank has died.

A board is one fixed record per rank in shared memory. Writing costs about a microsecond, so ranks
write it at every layer; the launching process reads it to draw progress and to name rank and step
when a rank dies. It never imports torch.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from dataclasses import dataclass

_RECORD = 4096
_STATUS = struct.Struct("<qq64s")  # done, total, phase
_FAILURE = struct.Struct("<d16sH")  # monotonic time (0: none), kind, bytes of the message
_FAILURE_AT = 256
_MESSAGE_AT = _FAILURE_AT + _FAILURE.size


@dataclass(frozen=True)
class Status:
    """`done` of `total` steps of `phase` are done; `total` is 0 if steps are not counted."""

    phase: str
    done: int
    total: int

    def __str__(self) -> str:
        step = f", step {min(self.done + 1, self.total)} of {self.total}" if self.total > 1 else ""
        return (self.phase or "start") + step


@dataclass(frozen=True)
class Failure:
    """The exception that ended a rank.

    kind: "user" for a UserError; "communication" for an error of a transfer, which may only be a
        consequence of another rank's end; otherwise "error".
    time: seconds of the monotonic clock, which the processes of a machine share.
    """

    rank: int
    time: float
    kind: str
    message: str


class Board:
    """Records of `ranks` ranks, in a file that processes share or in memory of this process.

    path: the file; None for memory of this process.
    make: create the file; otherwise FileNotFoundError is raised if it is missing.

    Raises OSError if the file system has no room for the file.
    """

    def __init__(
        self, ranks: int, path: str | os.PathLike[str] | None = None, *, make: bool = True
    ) -> None:
        self.ranks, self.path = ranks, path
        if path is None:
            self._memory = mmap.mmap(-1, ranks * _RECORD)
        else:
            with open(path, "x+b" if make else "r+b") as file:
                if make:
                    # Written, not only sized: SIGBUS ends a process that touches a mapped page for
                    # which the file system has no room.
                    file.write(bytes(ranks * _RECORD))
                    file.flush()
                self._memory = mmap.mmap(file.fileno(), ranks * _RECORD)

    def write(self, rank: int, phase: str, done: int = 0, total: int = 0) -> None:
        """Record that `rank` has done `done` of `total` steps of `phase` (at most 64 bytes)."""
        _STATUS.pack_into(self._memory, rank * _RECORD, done, total, phase.encode())

    def read(self, rank: int) -> Status:
        """Return what `rank` wrote last; the phase is empty before its first write."""
        done, total, phase = _STATUS.unpack_from(self._memory, rank * _RECORD)
        return Status(phase.rstrip(b"\0").decode(errors="replace"), done, total)

    def fail(self, rank: int, kind: str, message: str) -> None:
        """Record the exception that ends `rank`; see `Failure`. A long message is cut."""
        text = message.encode()[: _RECORD - _MESSAGE_AT]
        base = rank * _RECORD
        self._memory[base + _MESSAGE_AT : base + _MESSAGE_AT + len(text)] = text
        _FAILURE.pack_into(
            self._memory, base + _FAILURE_AT, time.monotonic(), kind.encode(), len(text)
        )

    def failures(self) -> list[Failure]:
        """Return the failures recorded so far, the earliest first."""
        found = []
        for rank in range(self.ranks):
            base = rank * _RECORD
            when, kind, length = _FAILURE.unpack_from(self._memory, base + _FAILURE_AT)
            if when:
                text = self._memory[base + _MESSAGE_AT : base + _MESSAGE_AT + length]
                kind = kind.rstrip(b"\0").decode()
                found.append(Failure(rank, when, kind, text.decode(errors="replace")))
        return sorted(found, key=lambda failure: failure.time)
