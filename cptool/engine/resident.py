"""A model that stays on its ranks between requests of the process that started them.

`Resident` is that process's side, `cptool.engine.rank_server.serve` what every rank runs. Each rank
waits on a connection of its own, not in a collective: idle ranks use no CPU and meet no timeout,
however long the next request takes to come.
"""

import contextlib
import multiprocessing
import os
import socket
import threading
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any, NoReturn

from cptool.distributed import launch
from cptool.distributed.failure import RankFailed
from cptool.distributed.local import RANK_NAME
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.engine.rank_modules import rank_modules
from cptool.engine.rank_server import serve
from cptool.engine.requests import (
    END,
    Answer,
    Close,
    Connection,
    Continue,
    Open,
    Refused,
    Save,
)
from cptool.engine.setup.loading import Setup
from cptool.errors import RunError, UserError

if TYPE_CHECKING:
    from cptool.engine.answers.records import Emit
    from cptool.session.manifest import Manifest

_PATIENCE_S = 5.0

_starting = threading.Lock()
"""Held while ranks start, so that those of two `Resident`s can be distinguished."""


class Resident:
    """Ranks at work for this process; a context manager that ends them.

    `distributed.launch.run` runs the ranks, in a thread. If they end before END is sent, the call
    that waits for them raises what `run` raised.
    """

    def __init__(self, setup: Setup, ranks: RankOptions) -> None:
        pairs = [socket.socketpair() for _ in range(ranks.count)]
        self._connections = [Connection(ours) for ours, _ in pairs]
        self._theirs = [theirs for _, theirs in pairs]
        self._failure: BaseException | None = None
        self._board: Board | None = None
        self._known = threading.Event()
        self._watch: Callable[[Board], None] = _unwatched
        self._timeout = ranks.timeout
        for connection in self._connections:
            connection.limit_sending(self._timeout)
        self._setup, self._ranks = setup, ranks
        self._thread = threading.Thread(target=self._run, name="cptool-ranks", daemon=True)
        self._others: set[BaseProcess] = set()
        self._processes: set[BaseProcess] | None = None
        self._owner = os.getpid()

    def __enter__(self) -> "Resident":
        self.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is not None:
            self.abandon()
        else:
            self.end()

    def start(self) -> None:
        """Start the ranks and block until all have loaded the model.

        Raises what `distributed.launch.run` does; then no rank is left.
        """
        with _starting:
            self._others = _rank_processes()
            try:
                if len(self._connections) > 1:
                    from cptool.distributed import server_process

                    # Here, because its signals are this thread's.
                    server_process.start(serve, rank_modules())
                self._thread.start()
                self._receive()  # that all are ready
                self._known.wait()
                self._processes = _rank_processes() - self._others
            except BaseException:
                self.abandon()
                raise

    @property
    def serving(self) -> bool:
        """Whether the ranks are running."""
        return self._thread.is_alive()

    def end(self) -> None:
        """End idle ranks and block until they have ended."""
        self._send(END)
        self._thread.join()
        self._close()

    def end_within(self, seconds: float) -> None:
        """End idle ranks and return after `seconds` at most, whatever became of them."""
        if os.getpid() == self._owner:
            with contextlib.suppress(Exception):  # they have ended by themselves
                self._send(END)
            self._thread.join(seconds)

    def abandon(self) -> None:
        """End ranks that may be in the middle of a computation, where they read no request."""
        if os.getpid() != self._owner:  # a fork of the process that started them
            return
        for rank in self._running():
            rank.terminate()
        self._close()

    def _running(self) -> set[BaseProcess]:
        if self._processes is None:
            return _rank_processes() - self._others
        return self._processes & _rank_processes()

    def _close(self) -> None:
        for connection in self._connections:
            connection.close()
        for theirs in self._theirs:
            theirs.close()
        # A single rank is that thread: left at work, it would be torn down with the interpreter.
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_S)

    def answer(
        self,
        request: Continue,
        emit: "Emit",
        watch: Callable[[Board], None] | None = None,
    ) -> Answer:
        """Fulfil the request; `emit` is called for each token as it comes.

        watch: called from another thread with the ranks' status board, about ten times a second.
        """
        self._watch = watch or _unwatched
        try:
            self._send(request)
            while isinstance(reply := self._receive(), list):
                emit(*reply)
        finally:
            self._watch = _unwatched
        return _unless_refused(reply)

    def stop(self, on: bool = True) -> None:
        """End the running request within a layer of its prompt, or with the next token of its
        answer, and those that follow, until it is turned off; a signal handler may call it.
        """
        assert self._board is not None  # the ranks have started
        self._board.cancel(on)

    def save(self, request: Save) -> "Manifest":
        """Commit a session and return its manifest, without segments.

        Raises RunError if that is not possible; the ranks go on.
        """
        self._send(request)
        return _unless_refused(self._receive())

    def open(self, request: Open) -> None:
        """Load a session into a slot.

        Raises UserError or RunError if that is not possible; the ranks go on.
        """
        self._send(request)
        _unless_refused(self._receive())

    def close_slot(self, request: Close) -> None:
        """Drop what a slot holds."""
        self._send(request)
        _unless_refused(self._receive())

    def _send(self, request: Any) -> None:
        taken = 0
        try:
            for connection in self._connections:
                connection.send(request)
                taken += 1
        except BlockingIOError:
            for process in self._running():
                process.kill()  # a stopped process reacts to nothing else
            reason = f"no answer from rank {taken}, which took no request for {self._timeout:g} s"
            raise RankFailed(f"{reason}; all ranks were ended") from None
        except OSError:
            self._raise()

    def _receive(self) -> Any:
        try:
            return self._connections[0].receive()
        except (EOFError, OSError):
            self._raise()

    def _raise(self) -> NoReturn:
        self._thread.join()
        raise self._failure or RunError("the ranks have ended")

    def _run(self) -> None:
        try:
            launch.run(serve, self._setup, own=self._theirs, ranks=self._ranks, watch=self._show)
        except BaseException as failure:
            self._failure = failure
        finally:
            for theirs in self._theirs:  # Ranks have copies. Whoever waits for a reply wakes up.
                theirs.close()

    def _show(self, board: Board) -> None:
        if self._board is None:
            self._board = board
            self._known.set()
        self._watch(board)


def _unwatched(board: Board) -> None:
    """Show nothing."""


def _rank_processes() -> set[BaseProcess]:
    """Return the ranks that this process has started; other children are not ours to end."""
    return {p for p in multiprocessing.active_children() if p.name.startswith(RANK_NAME)}


def _unless_refused(reply: Any) -> Any:
    if isinstance(reply, Refused):
        raise (UserError if reply.mistake else RunError)(reply.reason)
    return reply
