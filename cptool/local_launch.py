"""Starting the ranks of one machine under torch's elastic agent, and telling why a run ended.

Every rank has a record on the status board. When ranks fail, the first cause is what the user
needs; the errors of the others, whose transfers broke off, are its echo. See `_cause`.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
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
from cptool.errors import RunError, UserError
from cptool.launcher import launched
from cptool.status import Board
from cptool.termination import held_back

_POLL_S = 0.05
# How long a rank that raised stays alive. A rank that was killed is gone at once, so meanwhile the
# agent has seen that one and ended the others before they can end by themselves.
_LINGER_S = {"error": 0.5, "communication": 5.0}


def launch(
    entry: Callable[..., Any], args: tuple, options: tuple, board: Board, folder: str
) -> Any:
    """Call entry(world, *args) on local processes; rank 0's value, or the first cause as exception.

    options: (cp, tp, device, threads, timeout) of `cptool.distributed.run`, whose contract this
    fulfils, and CPTOOL_TRANSPORT of this process: the server that ranks are forked from may have
    started with another. board: in a file, one record per rank. folder: for temporary files of the
    agent.
    """
    start_server(entry)
    cp, tp, device, *others, asked = options
    device = resolve_device(device, board.ranks)
    transport(device, board.ranks, asked)  # what cannot be is told before any rank starts
    options = (cp, tp, device, *others, asked)

    with held_back():
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=board.ranks,
        run_id="cptool",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=_POLL_S,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=folder),
    )
    try:
        with _own_signals(), _quiet():
            return elastic_launch(config, _rank_main)(entry, args, options, board.path)[0]
    except SignalException as stopped:
        if stopped.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + stopped.sigval) from None
    except ChildFailedError as failed:
        rank, process = next(iter(failed.failures.items()))
        raise _cause(board, rank, process.pid, process.exitcode) from None


def start_server(entry: Callable[..., Any]) -> None:
    """Start what ranks that call `entry` are forked from, if it does not run yet.

    It has imported torch and started no thread of ours: four ranks are up in 0.3 s, against 3 to
    5 s when each imports torch by itself. It imports while this process does. `launch` starts it
    too. It hears no Ctrl-C.
    """
    forkserver.set_forkserver_preload(["torch.distributed.device_mesh", entry.__module__])
    with _deaf():
        forkserver.ensure_running()


def _rank_main(entry: Callable[..., Any], args: tuple, options: tuple, path: str) -> Any:
    """What a local rank runs: connect, call, and on an exception tell the board, which is in the
    file `path`, and end.
    """
    _die_with_launcher()
    seat = launched()
    try:
        board = Board(seat.size, path, make=False)
    except FileNotFoundError:  # the launching process is ending, and has put its folder away
        os._exit(1)
    # Ctrl-C reaches every process of the terminal, and the launching one tells of it. Python's own
    # handler would never run in a rank that is blocked in a transfer.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # see `_deaf`
    if Path("/sys/class/net/lo").exists():
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        value = call_entry(entry, args, connect(seat, *options, board))
        return value if seat.rank == 0 else None
    except UserError as error:
        board.fail(seat.rank, "user", str(error))
    except Exception as error:
        kind = "communication" if is_communication(error) else "error"
        board.fail(seat.rank, kind, describe(seat.rank, board, error))
        time.sleep(_LINGER_S[kind])
        if kind == "error" and not isinstance(error, (ImportError, OSError, RunError)):
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: leaving in order would wait for groups whose other ranks are stuck.
    os._exit(1)


def _cause(board: Board, rank: int, pid: int, exitcode: int) -> BaseException:
    """Why the run ended, given the process that the agent saw end first.

    If it left without a word, by a signal or by an exit of its own, that is the cause. Else the
    earliest failure on the board counts; if that is an error of communication, ranks that recorded
    nothing are the ones that hang.
    """
    if exitcode == -signal.SIGINT:
        return KeyboardInterrupt()
    failures = board.failures()
    recorded = {failure.rank for failure in failures}
    if exitcode < 0:
        number = -exitcode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        told = f"rank {rank} (pid {pid}) was killed by {name} during {board.read(rank)}"
    elif rank not in recorded:
        told = f"rank {rank} (pid {pid}) exited with code {exitcode} during {board.read(rank)}"
    else:
        told = failures[0].message
        if failures[0].kind == "user":
            return UserError(told)
        silent = set(range(board.ranks)) - recorded
        if failures[0].kind == "communication" and silent:
            stuck = ", ".join(f"rank {r} during {board.read(r)}" for r in sorted(silent))
            told = f"no answer from {stuck} ({told})"
    return RankFailed(f"{told}; all ranks were ended")


def _die_with_launcher() -> None:
    """End this process when the launching one is gone, however that went.

    A thread because the kernel's parent of a rank is the fork server, which outlives its client for
    as long as ranks do, so that a parent-death signal would never come.
    """
    launcher = multiprocessing.parent_process()

    def watch() -> None:
        launcher.join()
        os._exit(1)

    threading.Thread(target=watch, name="cptool-launcher", daemon=True).start()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Give back the signal handlers that the agent replaces."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = {number: signal.getsignal(number) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the agent's loggers: what they tell of a failure, one line tells better."""
    prefixes = ("torch.distributed.elastic", "torch.distributed.launcher", "torch.multiprocessing")
    names = [name for name in logging.root.manager.loggerDict if name.startswith(prefixes)]
    before = [(logging.getLogger(name), logging.getLogger(name).level) for name in names]
    try:
        for logger, _ in before:
            logger.setLevel(logging.CRITICAL + 1)
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)
