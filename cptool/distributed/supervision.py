"""Waiting for the local ranks of a run, and finding out why it ended.

Every rank has a record on the status board. If ranks fail, the user needs the first cause; the
errors of the others, whose transfers broke off, only follow from it. See `_cause`.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cptool.distributed import server_process
from cptool.distributed.failure import RankFailed
from cptool.distributed.status_board import Board
from cptool.distributed.stopped import is_stopped
from cptool.errors import UserError, text_of

_POLL_S = 0.5
# How long to look for the cause once a rank has failed: it may appear after its consequences.
_GRACE_S = 1.0
# The exit code that multiprocessing assumes if the server can no longer report one.
_UNKNOWN = 255


class _Answer(threading.Thread):
    """Reads what rank 0 returned, in a thread because a rank may be stopped in the middle of it.

    content: the bytes received; None before they are complete. The thread ends then, or once all
        ranks have ended.
    """

    def __init__(self, receiver: Connection) -> None:
        super().__init__(name="cptool-answer", daemon=True)
        self.content: bytes | None = None
        self._receiver = receiver

    def run(self) -> None:
        with self._receiver, contextlib.suppress(EOFError, OSError):
            self.content = self._receiver.recv_bytes()


class Supervision:
    """Waits for the ranks of a run, and determines how it ended."""

    def __init__(
        self, ranks: Sequence[BaseProcess], receiver: Connection, board: Board, timeout: float
    ) -> None:
        self.ranks, self.board, self.timeout = ranks, board, timeout
        self.answer = _Answer(receiver)
        self.running = {process.sentinel: rank for rank, process in enumerate(ranks)}
        self.ended: list[int] = []

    def result(self) -> Any:
        """Return rank 0's value once all ranks have ended in order; else raise the cause."""
        self.answer.start()
        over: float | None = None
        while self.running:
            self._look(_POLL_S)
            if any(self._exitcode(rank) for rank in self.ended):
                until = time.monotonic() + _GRACE_S
                while self.running and not self._killed() and time.monotonic() < until:
                    self._look(max(0.0, until - time.monotonic()))
                raise self._cause()
            # Ranks that wait for each other keep to the timeout by themselves. It has to be kept
            # here if all of them are stopped, if some have ended and the rest do not follow, and if
            # the parent, which reports their ends, is stopped.
            silent = is_stopped(server_process.pid())
            if not self.ended and not silent and not self._all_stopped():
                over = None
            elif over is None:
                over = time.monotonic() + self.timeout
            elif time.monotonic() > over:
                if self.ended or self.answer.content is not None:
                    break
                ranks = ", ".join(self._doing(rank) for rank in sorted(self.running.values()))
                who = f"{server_process.described()}, which is stopped" if silent else ranks
                raise RankFailed(f"no answer within {self.timeout:g} s from {who}; {ENDED}")
        return self._value()

    def join(self) -> None:
        """Wait for the thread that reads the answer, which ends soon after the ranks."""
        if self.answer.is_alive():
            self.answer.join(_GRACE_S)

    def _look(self, patience: float) -> None:
        """Note which ranks ended, within `patience` seconds."""
        ready = wait(list(self.running), patience)
        self.ended += [self.running.pop(end) for end in list(self.running) if end in ready]

    def _exitcode(self, rank: int) -> int:
        """Return the exit code of a rank that has ended; the negative number of a signal."""
        code = self.ranks[rank].exitcode
        assert code is not None
        return code

    def _value(self) -> Any:
        """Return what rank 0 returned. Raises RankFailed if that did not arrive completely."""
        self.answer.join(_GRACE_S if self.running else self.timeout)
        if self.answer.content is None:
            how = f"no answer within {self.timeout:g} s from" if self.running else "no answer from"
            raise RankFailed(f"{how} {self._doing(0)}; {ENDED}")
        try:
            return pickle.loads(self.answer.content)
        except Exception as error:
            reason = f"{type(error).__name__}: {text_of(error)}"
            raise RankFailed(f"what rank 0 returned cannot be read ({reason})") from error

    def _killed(self) -> list[int]:
        """Return the ranks that ended by a signal, or with an error code and no record of it."""
        recorded = {failure.rank for failure in self.board.failures()}
        codes = [(rank, self._exitcode(rank)) for rank in self.ended]
        return [rank for rank, code in codes if code < 0 or (code and rank not in recorded)]

    def _all_stopped(self) -> bool:
        return all(is_stopped(self.ranks[rank].pid) for rank in self.running.values())

    def _doing(self, rank: int) -> str:
        stopped = self.running and is_stopped(self.ranks[rank].pid)
        state = f" (pid {self.ranks[rank].pid}, which is stopped)" if stopped else ""
        return f"rank {rank}{state} during {self.board.read(rank)}"

    def _cause(self) -> BaseException:
        """Return the exception that explains why the run ended, once a rank has failed.

        A user's mistake is never a consequence of another failure, so it comes first. Next are
        ranks that were killed or exited without a record. A rank that aborted may have lost its
        peer, to which libraries respond with an abort, so a recorded exception comes before it. If
        all errors are errors of communication, the ranks that recorded nothing are those that hang.
        """
        if any(self._exitcode(rank) == -signal.SIGINT for rank in self.ended):
            return KeyboardInterrupt()
        if any(self._exitcode(rank) == server_process.UNGUARDED for rank in self.ended):
            return UserError(
                "ranks import the main module, which starts ranks wherever it is imported; put "
                'that part of it under `if __name__ == "__main__":`'
            )
        failures, killed = self.board.failures(), self._killed()
        own = [failure for failure in failures if failure.kind != "communication"]
        if own and own[0].kind == "user":
            return UserError(own[0].message)
        outright = [rank for rank in killed if self._exitcode(rank) != -signal.SIGABRT]
        lost = any(self._exitcode(rank) == _UNKNOWN for rank in killed)
        if lost and server_process.ends_within(_GRACE_S):
            reason = f"{server_process.described()} has ended"
        elif outright or (killed and not own):
            reason = self._death(*(outright or killed)[:1])
        elif own:
            reason = own[0].message
        else:
            reason = failures[0].message
            silent = set(range(self.board.ranks)) - {failure.rank for failure in failures}
            if silent:
                reason = f"no answer from {', '.join(map(self._doing, sorted(silent)))} ({reason})"
        return RankFailed(f"{reason}; {ENDED}")

    def _death(self, rank: int) -> str:
        """Return how a rank ended that recorded no exception."""
        pid, exitcode = self.ranks[rank].pid, self._exitcode(rank)
        doing = self.board.read(rank)
        if exitcode >= 0:
            return f"rank {rank} (pid {pid}) exited with code {exitcode} during {doing}"
        known = -exitcode in set(signal.Signals)
        name = signal.Signals(-exitcode).name if known else f"signal {-exitcode}"
        death = f"rank {rank} (pid {pid}) was killed by {name} during {doing}"
        if reason := _REASONS.get(-exitcode):
            death += f" (as the system does where {reason})"
        return death


ENDED = "all ranks were ended"

_REASONS: dict[int, str] = {
    signal.SIGKILL: "memory, or a control group's limit, runs out",
    signal.SIGBUS: "a file of weights was truncated while it was in use, or could not be read",
}
