"""What each rank is doing, readable by another process even after the rank has died.

A board is one fixed record per rank in shared memory. Writing costs about a microsecond, so ranks
write it at every layer; the launching process reads it to draw progress and to name rank and step
when a rank dies. Within a layer the kernels themselves count into it, and look there for the
launching process's request to stop. It never imports torch.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from dataclasses import dataclass

IDLE = "wait for a request"
"""The phase of ranks that have nothing to do."""

SAVING = "save the session"
"""The phase of ranks whose turn is over and being kept."""

_RECORD = 4096
_STATUS = struct.Struct("<qq64s")  # done, total, phase
_WORK_AT = _STATUS.size
_WORK = struct.Struct("<qddd2q")  # tokens, began, share, running, pairs, since
_WORD = struct.Struct("<q")
_CANCELLED_AT, _CANCELLABLE_AT, _NOTICED_AT = 144, 152, 160  # in the record of rank 0
_PAIRS_AT = 192  # a line of the cache of its own: kernels add to it all the time
_FAILURE = struct.Struct("<d16sH")  # monotonic time (0: none), kind, bytes of the message
_FAILURE_AT = 256
_MESSAGE_AT = _FAILURE_AT + _FAILURE.size
_CHUNK = struct.Struct("<4q24s")  # done, chunk, chunks, memory, variant
_CHUNK_AT = _RECORD - _CHUNK.size


@dataclass(frozen=True, kw_only=True)
class Work:
    """How far the reading of a prompt is, in time, not in steps.

    tokens: the new ones. began: when, in seconds of the monotonic clock. share: of the work that is
    done, from 0 to 1. running: the share of the part in progress, all of it attention, which is
    done once the count of pairs has grown from `since` by `pairs`. done: tokens of the chunks that
    are done. chunk: index of the one under way, of `chunks`, under `variant`. memory: bytes that
    the rank holds.
    """

    tokens: int
    began: float
    share: float
    running: float = 0.0
    pairs: int = 0
    since: int = 0
    done: int = 0
    chunk: int = 0
    chunks: int = 1
    variant: str = ""
    memory: int = 0


@dataclass(frozen=True)
class Status:
    """`done` of `total` steps of `phase` are done; `total` is 0 if steps are not counted.

    work: how far a forward over a prompt is, up to this moment; None in other phases.
    """

    phase: str
    done: int
    total: int
    work: Work | None = None

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

    def write(
        self, rank: int, phase: str, done: int = 0, total: int = 0, *, work: Work | None = None
    ) -> None:
        """Record that `rank` has done `done` of `total` steps of `phase` (at most 64 bytes)."""
        base = rank * _RECORD
        w = work or Work(tokens=0, began=0.0, share=0.0)
        fields = (w.tokens, w.began, w.share, w.running, w.pairs, w.since)
        chunk = (w.done, w.chunk, w.chunks, w.memory, w.variant.encode())
        _WORK.pack_into(self._memory, base + _WORK_AT, *fields)
        _CHUNK.pack_into(self._memory, base + _CHUNK_AT, *chunk)
        _STATUS.pack_into(self._memory, base, done, total, phase.encode())

    def read(self, rank: int) -> Status:
        """Return what `rank` wrote last; the phase is empty before its first write."""
        base = rank * _RECORD
        done, total, phase = _STATUS.unpack_from(self._memory, base)
        tokens, began, share, running, pairs, since = _WORK.unpack_from(
            self._memory, base + _WORK_AT
        )
        work = None
        if tokens:
            grown = self.pairs(rank) - since
            share += running * min(1.0, max(0.0, grown / pairs)) if pairs else 0.0
            past, chunk, chunks, held, variant = _CHUNK.unpack_from(self._memory, base + _CHUNK_AT)
            work = Work(
                tokens=tokens,
                began=began,
                share=share,
                done=past,
                chunk=chunk,
                chunks=chunks,
                variant=variant.rstrip(b"\0").decode(errors="replace"),
                memory=held,
            )
        return Status(phase.rstrip(b"\0").decode(errors="replace"), done, total, work)

    @property
    def shared(self) -> bool:
        """Whether the process that launched the ranks sees what they write, and they its words."""
        return self.path is not None or self.ranks == 1

    def pairs(self, rank: int) -> int:
        """Return how many pairs of query and key this rank's attention has computed."""
        return self._word(rank * _RECORD + _PAIRS_AT)

    def pairs_address(self, rank: int) -> int:
        """Return the address in this process of what `pairs` returns, an int64."""
        return self._address() + rank * _RECORD + _PAIRS_AT

    def cancel(self, on: bool = True) -> None:
        """Request that all ranks stop what they are doing, or take the request back."""
        _WORD.pack_into(self._memory, _CANCELLED_AT, int(on))

    @property
    def cancelled(self) -> bool:
        """Whether ranks are to stop what they are doing."""
        return bool(self._word(_CANCELLED_AT))

    def cancelled_address(self) -> int:
        """Return the address in this process of what `cancel` sets, an int64."""
        return self._address() + _CANCELLED_AT

    def allow_cancelling(self) -> None:
        """Record that the ranks look at `cancelled` from now on."""
        _WORD.pack_into(self._memory, _CANCELLABLE_AT, 1)

    @property
    def cancellable(self) -> bool:
        """Whether `cancel` has an effect, so that nothing else has to end the ranks."""
        return bool(self._word(_CANCELLABLE_AT))

    def notice(self) -> None:
        """Record that the ranks have agreed to stop: what follows is only to keep their work."""
        _WORD.pack_into(self._memory, _NOTICED_AT, 1)

    @property
    def noticed(self) -> bool:
        """Whether the ranks have agreed to stop."""
        return bool(self._word(_NOTICED_AT))

    def _word(self, at: int) -> int:
        return int(_WORD.unpack_from(self._memory, at)[0])

    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    def fail(self, rank: int, kind: str, message: str) -> None:
        """Record the exception that ends `rank`; see `Failure`. A long message is cut."""
        text = message.encode()[: _CHUNK_AT - _MESSAGE_AT]
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
