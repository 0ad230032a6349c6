"""Waiting for the local ranks of a run, and finding out why it ended.

Every rank has a record on the status board. When ranks fail, the first cause is what the user
needs; the errors of the others, whose transfers broke off, are its echo. See `_cause`.
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
# The cause may show only after its echo: how long to look for it once a rank has failed.
_GRACE_S = 1.0
# What multiprocessing makes of the exit code that the server can no longer tell.
_UNKNOWN = 255


class _Answer(threading.Thread):
    """Reads what rank 0 returned, in a thread: a rank may be stopped in the midst of it.

    `content` is None until it has come. The thread ends with it, or once all ranks have ended.
    """

    def __init__(self, receiver: Connection) -> None:
        super().__init__(name="cptool-answer", daemon=True)
        self.content: bytes | None = None
        self._receiver = receiver

    def run(self) -> None:
        with self._receiver, contextlib.suppress(EOFError, OSError):
            self.content = self._receiver.recv_bytes()


class Supervision:
    """Waits for the ranks of a run, and says how it ended."""

    def __init__(
        self, ranks: Sequence[BaseProcess], receiver: Connection, board: Board, timeout: float
    ) -> None:
        self.ranks, self.board, self.timeout = ranks, board, timeout
        self.answer = _Answer(receiver)
        self.running = {process.sentinel: rank for rank, process in enumerate(ranks)}
        self.ended: list[int] = []

    def result(self) -> Any:
        """Rank 0's value once all ranks have ended in order; raises the cause if one did not."""
        self.answer.start()
        over: float | None = None
        while self.running:
            self._look(_POLL_S)
            if any(self._exitcode(rank) for rank in self.ended):
                until = time.monotonic() + _GRACE_S
                while self.running and not self._killed() and time.monotonic() < until:
                    self._look(max(0.0, until - time.monotonic()))
                raise self._cause()
            # Ranks that wait for each other keep to the timeout by themselves, unless all of them
            # are stopped, or those that are left when others were done. Of their ends, their parent
            # tells.
            silent = is_stopped(server_process.pid())
            if not self.ended and not silent and not self._all_stopped():
                over = None
            elif over is None:
                over = time.monotonic() + self.timeout
            elif time.monotonic() > over:
                if self.ended or self.answer.content is not None:
                    break
                ranks = ", ".join(self._doing(rank) for rank in sorted(self.running.values()))
                told = f"{server_process.described()}, which is stopped" if silent else ranks
                raise RankFailed(f"no answer within {self.timeout:g} s from {told}; {ENDED}")
        return self._value()

    def _look(self, patience: float) -> None:
        """Note which ranks ended, within `patience` seconds."""
        ready = wait(list(self.running), patience)
        self.ended += [self.running.pop(end) for end in list(self.running) if end in ready]

    def _exitcode(self, rank: int) -> int:
        """Exit code of a rank that has ended; the negative number of the signal that killed it."""
        code = self.ranks[rank].exitcode
        assert code is not None
        return code

    def _value(self) -> Any:
        """What rank 0 returned; RankFailed where that did not arrive whole."""
        self.answer.join(_GRACE_S if self.running else self.timeout)
        if self.answer.content is None:
            how = f"no answer within {self.timeout:g} s from" if self.running else "no answer from"
            raise RankFailed(f"{how} {self._doing(0)}; {ENDED}")
        try:
            return pickle.loads(self.answer.content)
        except Exception as error:
            told = f"{type(error).__name__}: {text_of(error)}"
            raise RankFailed(f"what rank 0 returned cannot be read ({told})") from error

    def _killed(self) -> list[int]:
        """Ranks that ended by a signal or, without a word on the board, by an exit of their own."""
        recorded = {failure.rank for failure in self.board.failures()}
        codes = [(rank, self._exitcode(rank)) for rank in self.ended]
        return [rank for rank, code in codes if code < 0 or (code and rank not in recorded)]

    def _all_stopped(self) -> bool:
        return all(is_stopped(self.ranks[rank].pid) for rank in self.running.values())

    def _doing(self, rank: int) -> str:
        stopped = self.running and is_stopped(self.ranks[rank].pid)
        told = f" (pid {self.ranks[rank].pid}, which is stopped)" if stopped else ""
        return f"rank {rank}{told} during {self.board.read(rank)}"

    def _cause(self) -> BaseException:
        """Why the run ended, once a rank has failed.

        A mistake of the user's is nobody's echo. Next counts who was killed, or left without a
        word; one that aborted may have been made to by a library that lost its peer, so an
        exception comes before it. If there are errors of communication alone, ranks that recorded
        nothing are the ones that hang.
        """
        if any(self._exitcode(rank) == -signal.SIGINT for rank in self.ended):
            return KeyboardInterrupt()
        failures, killed = self.board.failures(), self._killed()
        own = [failure for failure in failures if failure.kind != "communication"]
        if own and own[0].kind == "user":
            return UserError(own[0].message)
        outright = [rank for rank in killed if self._exitcode(rank) != -signal.SIGABRT]
        lost = any(self._exitcode(rank) == _UNKNOWN for rank in killed)
        if lost and server_process.ends_within(_GRACE_S):
            told = f"{server_process.described()} has ended"
        elif outright or (killed and not own):
            told = self._death(*(outright or killed)[:1])
        elif own:
            told = own[0].message
        else:
            told = failures[0].message
            silent = set(range(self.board.ranks)) - {failure.rank for failure in failures}
            if silent:
                told = f"no answer from {', '.join(map(self._doing, sorted(silent)))} ({told})"
        return RankFailed(f"{told}; {ENDED}")

    def _death(self, rank: int) -> str:
        """How a rank ended that recorded no exception."""
        pid, exitcode = self.ranks[rank].pid, self._exitcode(rank)
        doing = self.board.read(rank)
        if exitcode >= 0:
            return f"rank {rank} (pid {pid}) exited with code {exitcode} during {doing}"
        known = -exitcode in set(signal.Signals)
        name = signal.Signals(-exitcode).name if known else f"signal {-exitcode}"
        told = f"rank {rank} (pid {pid}) was killed by {name} during {doing}"
        if -exitcode == signal.SIGKILL:
            told += " (as the system does where memory, or a control group's limit, runs out)"
        return told


ENDED = "all ranks were ended"
