"""Starting the ranks of one machine, ending them, and telling why a run ended.

Ranks are forked from a server that has imported torch. Nothing of a run listens but on loopback
(`cptool.rendezvous`), and what a rank is started with, and what it returns, goes through pipes that
it inherits: no other process can have written it. torch's elastic agent, which torchrun uses, is
not used here: its store listens on all interfaces without a password, it unpickles what it finds
there, and it gives a stopped rank 30 s.

Every rank has a record on the status board. When ranks fail, the first cause is what the user
needs; the errors of the others, whose transfers broke off, are its echo. See `_cause`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from cptool.distributed import (
    RankFailed,
    call_entry,
    connect,
    describe,
    is_communication,
    resolve_device,
    transport,
)
from cptool.errors import UserError, show_traceback, text_of
from cptool.launcher import Seat
from cptool.rendezvous import check_loopback, file_store, listen_on_loopback, start_deadline
from cptool.scratch import Folder, make_folder, others_can_replace
from cptool.status import Board
from cptool.stopped import is_stopped
from cptool.termination import end_with_parent, held_back

_POLL_S = 0.5
# The cause may show only after its echo: how long to look for it once a rank has failed.
_GRACE_S = 1.0
# For ranks to end in order after SIGTERM; a stopped one does not hear it.
_ORDERLY_S = 2.0
# A process that waits for a disk ends only when the disk answers.
_KILLED_S = 2.0
# What multiprocessing makes of the exit code that the server can no longer tell.
_UNKNOWN = 255
# Longest temporary directory with room for the name of the server's socket (107 bytes in all).
_LONGEST_BASE = 55


def launch(
    entry: Callable[..., Any],
    args: tuple,
    options: tuple,
    board: Board,
    folder: str,
    own: Sequence[Any] | None = None,
) -> Any:
    """Call entry(world, *args) on local processes; rank 0's value, or the first cause as exception.

    options: (cp, tp, device, threads, timeout) of `cptool.distributed.run`, whose contract this
    fulfils, and CPTOOL_TRANSPORT of this process: the server that ranks are forked from may have
    started with another. board: in a file of `folder`, one record per rank. folder: private, where
    the ranks meet. own: a last argument for each rank.
    """
    check_loopback()
    start_server(entry)
    cp, tp, device, *others, asked = options
    device = resolve_device(device, board.ranks)
    transport(device, board.ranks, asked)  # what cannot be is told before any rank starts
    options = (cp, tp, device, *others, asked)

    context = multiprocessing.get_context("forkserver")
    receiver, answer = context.Pipe(duplex=False)
    ranks: list[BaseProcess] = []
    try:
        with held_back(), start_deadline(options[4], _kill_stopped_server):
            for rank in range(board.ranks):
                seat = Seat(rank, board.ranks, rank, board.ranks)
                given = args if own is None else (*args, own[rank])
                to = answer if rank == 0 else None
                process = context.Process(
                    target=_rank_main,
                    args=(seat, entry, given, options, str(board.path), folder, to),
                    name=f"cptool-rank-{rank}",
                    daemon=True,
                )
                process.start()
                ranks.append(process)
            answer.close()
        return _Supervision(ranks, receiver, board, timeout=options[4]).result()
    except FileNotFoundError:  # of the server's socket
        raise RankFailed(f"{_socket_folder.name} was removed while the run used it") from None
    except EOFError:
        raise RankFailed(f"{_server()} was stopped or has ended; {_ENDED}") from None
    finally:
        _end(ranks)


def start_server(entry: Callable[..., Any]) -> None:
    """Start what ranks that call `entry` are forked from, if it does not run yet.

    It has imported torch and started no thread of ours: four ranks are up in 0.3 s, against 3 to
    5 s when each imports torch by itself. It imports while this process does. `launch` starts it
    too. It hears no Ctrl-C.
    """
    # Until 3.10.8 and 3.11.0 Python gave the server's socket a name in no directory, to which any
    # user of the machine could connect and have code run (CVE-2022-42919).
    util.abstract_sockets_supported = False
    _choose_socket_folder()
    modules = ["torch.distributed.device_mesh", entry.__module__]
    # The end that it is tied to is that of the thread that starts it.
    if threading.current_thread() is threading.main_thread():
        modules.insert(0, "cptool.fork_server")
    forkserver.set_forkserver_preload(modules)
    with _deaf():
        forkserver.ensure_running()


_socket_folder: Folder | None = None


def _choose_socket_folder() -> None:
    """Have the server's socket in a private folder that goes with this process, or is swept after
    it, and whose path is short enough for a socket.
    """
    global _socket_folder
    if _socket_folder is not None:
        return
    bases = [tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), "/tmp", "/dev/shm"]
    fitting = [b for b in bases if b and len(os.fsencode(b)) <= _LONGEST_BASE]
    usable = [b for b in fitting if os.access(b, os.W_OK | os.X_OK)]
    safe = [b for b in usable if not others_can_replace(b)]
    base = next(iter(safe or usable), None)
    if base is None:
        raise UserError(
            f"the temporary directory {bases[0]} has too long a name for a socket; set TMPDIR to "
            f"one of at most {_LONGEST_BASE} characters"
        )
    _socket_folder = make_folder(base)
    util.Finalize(None, _socket_folder.cleanup, exitpriority=-100)  # after all of its users
    # Else multiprocessing makes a folder of its own, with a traceback if that is gone at exit.
    multiprocessing.current_process()._config["tempdir"] = _socket_folder.name


def _rank_main(
    seat: Seat,
    entry: Callable[..., Any],
    args: tuple,
    options: tuple,
    path: str,
    folder: str,
    answer: Connection | None,
) -> None:
    """What a local rank runs: connect, call, and on an exception tell the board, which is in the
    file `path`, and end. answer: where rank 0 sends what `entry` returned.
    """
    _die_with_launcher()
    for name, value in (
        ("RANK", seat.rank),
        ("WORLD_SIZE", seat.size),
        ("LOCAL_RANK", seat.local_rank),
        ("LOCAL_WORLD_SIZE", seat.local_size),
    ):
        os.environ[name] = str(value)
    try:
        board = Board(seat.size, path, make=False)
        store = file_store(folder, seat.size)
    except FileNotFoundError:  # the launching process is ending, and has put its folder away
        os._exit(1)
    # Ctrl-C reaches every process of the terminal, and the launching one tells of it. Python's own
    # handler would never run in a rank that is blocked in a transfer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `_deaf`
    listen_on_loopback()

    def give_up() -> None:
        board.fail(seat.rank, "communication", f"rank {seat.rank} did not meet the others")
        os._exit(1)

    try:
        with start_deadline(options[4], give_up):
            world = connect(seat, *options, board, store)
        value = call_entry(entry, args, world)
        if answer is not None:
            # Not by `send`: with it torch shares a tensor's memory, which ends with this process.
            answer.send_bytes(pickle.dumps(value))
        return
    except (KeyboardInterrupt, SystemExit):
        raise
    except UserError as error:
        board.fail(seat.rank, "user", str(error))
    except BaseException as error:  # also what is no Exception, as a panic of Rust is
        kind = "communication" if is_communication(error) else "error"
        board.fail(seat.rank, kind, describe(seat.rank, board, error))
        if kind == "error":
            show_traceback(error)
    with contextlib.suppress(OSError, AttributeError):  # closed from the beginning, or full
        sys.stdout.flush()
        sys.stderr.flush()
    # Not sys.exit: leaving in order would wait for groups whose other ranks are stuck.
    os._exit(1)


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


class _Supervision:
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
            if any(self.ranks[rank].exitcode for rank in self.ended):
                until = time.monotonic() + _GRACE_S
                while self.running and not self._killed() and time.monotonic() < until:
                    self._look(max(0.0, until - time.monotonic()))
                raise self._cause()
            # Ranks that wait for each other keep to the timeout by themselves, unless all of them
            # are stopped, or those that are left when others were done. Of their ends, their parent
            # tells.
            silent = is_stopped(_server_pid())
            if not self.ended and not silent and not self._all_stopped():
                over = None
            elif over is None:
                over = time.monotonic() + self.timeout
            elif time.monotonic() > over:
                if self.ended or self.answer.content is not None:
                    break
                ranks = ", ".join(self._doing(rank) for rank in sorted(self.running.values()))
                told = f"{_server()}, which is stopped" if silent else ranks
                raise RankFailed(f"no answer within {self.timeout:g} s from {told}; {_ENDED}")
        return self._value()

    def _look(self, patience: float) -> None:
        """Note which ranks ended, within `patience` seconds."""
        self.ended += [self.running.pop(ready) for ready in wait(list(self.running), patience)]

    def _value(self) -> Any:
        """What rank 0 returned; RankFailed where that did not arrive whole."""
        self.answer.join(_GRACE_S if self.running else self.timeout)
        if self.answer.content is None:
            how = f"no answer within {self.timeout:g} s from" if self.running else "no answer from"
            raise RankFailed(f"{how} {self._doing(0)}; {_ENDED}")
        try:
            return pickle.loads(self.answer.content)
        except Exception as error:
            told = f"{type(error).__name__}: {text_of(error)}"
            raise RankFailed(f"what rank 0 returned cannot be read ({told})") from error

    def _killed(self) -> list[int]:
        """Ranks that ended by a signal or, without a word on the board, by an exit of their own."""
        recorded = {failure.rank for failure in self.board.failures()}
        codes = [(rank, self.ranks[rank].exitcode) for rank in self.ended]
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
        if any(self.ranks[rank].exitcode == -signal.SIGINT for rank in self.ended):
            return KeyboardInterrupt()
        failures, killed = self.board.failures(), self._killed()
        own = [failure for failure in failures if failure.kind != "communication"]
        if own and own[0].kind == "user":
            return UserError(own[0].message)
        outright = [rank for rank in killed if self.ranks[rank].exitcode != -signal.SIGABRT]
        lost = any(self.ranks[rank].exitcode == _UNKNOWN for rank in killed)
        if lost and _server_ends_within(_GRACE_S):
            told = f"{_server()} has ended"
        elif outright or (killed and not own):
            told = self._death(*(outright or killed)[:1])
        elif own:
            told = own[0].message
        else:
            told = failures[0].message
            silent = set(range(self.board.ranks)) - {failure.rank for failure in failures}
            if silent:
                told = f"no answer from {', '.join(map(self._doing, sorted(silent)))} ({told})"
        return RankFailed(f"{told}; {_ENDED}")

    def _death(self, rank: int) -> str:
        """How a rank ended that recorded no exception."""
        pid, exitcode = self.ranks[rank].pid, self.ranks[rank].exitcode
        doing = self.board.read(rank)
        if exitcode >= 0:
            return f"rank {rank} (pid {pid}) exited with code {exitcode} during {doing}"
        known = -exitcode in set(signal.Signals)
        name = signal.Signals(-exitcode).name if known else f"signal {-exitcode}"
        told = f"rank {rank} (pid {pid}) was killed by {name} during {doing}"
        if -exitcode == signal.SIGKILL:
            told += " (as the system does where memory, or a control group's limit, runs out)"
        return told


_ENDED = "all ranks were ended"


def _server_pid() -> int:
    """The process that ranks are forked from, which must be running."""
    return forkserver._forkserver._forkserver_pid


def _server() -> str:
    return f"the process that ranks are forked from (pid {_server_pid()})"


def _server_ends_within(seconds: float) -> bool:
    until = time.monotonic() + seconds  # its pipes are closed a moment before it has ended
    try:
        while not os.waitid(os.P_PID, _server_pid(), os.WEXITED | os.WNOHANG | os.WNOWAIT):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
    except ChildProcessError:  # somebody has waited for it
        pass
    return True


def _kill_stopped_server() -> None:
    """Kill it, and its ranks with it, if it is stopped: it hears nothing else."""
    if is_stopped(_server_pid()):
        os.kill(_server_pid(), signal.SIGKILL)


def _end(ranks: Sequence[BaseProcess]) -> None:
    """End what still runs: in order where that takes no time, else at once."""
    _kill_stopped_server()
    running = [process for process in ranks if process.is_alive()]
    for process in running:
        process.terminate()
    until = time.monotonic() + _ORDERLY_S
    for process in running:
        process.join(0.0 if is_stopped(process.pid) else max(0.0, until - time.monotonic()))
    running = [process for process in running if process.is_alive()]
    for process in running:
        process.kill()
    until = time.monotonic() + _KILLED_S
    for process in running:
        process.join(max(0.0, until - time.monotonic()))


def _die_with_launcher() -> None:
    """End this process when the launching one is gone, however that went.

    The kernel kills it when its parent, the fork server, ends, which does so with its own
    (`cptool.fork_server`). That takes even a stopped rank. A thread watches too, for a server that
    a thread started, which outlives its client for as long as ranks do.
    """
    end_with_parent()
    launcher = multiprocessing.parent_process()

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, name="cptool-launcher", daemon=True).start()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Block Ctrl-C, which then waits, and so has a process that is started here blocked from its
    beginning.

    It reaches every process of the terminal, and the fork server, which ignores it once it serves,
    would tell of it while it still imports.
    """
    resource_tracker.ensure_running()  # as the server would; starting it unblocks
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
